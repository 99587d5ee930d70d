// read_pieces and merge: what attention by dense kernels needs besides them.
#include "bindings/bindings.h"
#include "bindings/fields.h"

namespace kvquant::bindings {
namespace {

// (address, batch stride, token stride, head stride), in elements.
Rows rows_of(const py::handle& given) {
  const auto t = py::reinterpret_borrow<py::tuple>(given);
  return {pointer<void>(t[0].cast<uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
          t[3].cast<int64_t>()};
}

// young: (address, bytes between sequences, between heads), zeros: there are none. pieces: (key,
// value, first, tokens, low, high, backwards) each.
void read_pieces(const CacheView& cache, uintptr_t block_table, int64_t table_stride, int batch,
                 int max_blocks, const py::tuple& young, int young_from, const py::list& pieces,
                 int dtype, int device, uintptr_t queue) {
  Sequences seqs{};
  seqs.block_table = pointer<const int32_t>(block_table);
  seqs.block_table_stride = table_stride;
  seqs.batch = batch, seqs.max_blocks = max_blocks;
  assign(young, seqs.young);
  PieceParams params{};
  params.cache = cache, params.seqs = seqs;
  if (pieces.size() > kMostPieces) {
    throw py::value_error("pieces: expected at most " + std::to_string(kMostPieces) + ", got " +
                          std::to_string(pieces.size()));
  }
  for (const py::handle& given : pieces) {
    const auto t = py::reinterpret_borrow<py::tuple>(given);
    Piece& piece = params.pieces[params.count++];
    piece.key = pointer<void>(t[0].cast<uintptr_t>());
    piece.value = pointer<void>(t[1].cast<uintptr_t>());
    piece.first = t[2].cast<int>(), piece.tokens = t[3].cast<int>();
    piece.low = t[4].cast<int>(), piece.high = t[5].cast<int>();
    piece.backwards = t[6].cast<bool>();
  }
  params.dtype = Dtype(dtype), params.young_from = young_from;
  Status status;
  {
    py::gil_scoped_release release;
    status = KVQUANT_CUDA_OR_REFUSE(cuda::read_pieces(params, {device, pointer<void>(queue)}));
  }
  check(status, "read_pieces");
}

// sources: (out, lse, float32, backwards) each; sizes: (batch, tokens, heads, dim).
void merge(const py::list& sources, const py::tuple& sizes, int dtype, const py::tuple& out,
           bool float32, const py::object& lse, uintptr_t sinks, int device, uintptr_t queue) {
  MergeParams params{};
  if (sources.size() > kMostMerged) {
    throw py::value_error("sources: expected at most " + std::to_string(kMostMerged) + ", got " +
                          std::to_string(sources.size()));
  }
  for (const py::handle& given : sources) {
    const auto t = py::reinterpret_borrow<py::tuple>(given);
    params.sources[params.count++] = {rows_of(t[0]), rows_of(t[1]), t[2].cast<bool>(),
                                      t[3].cast<bool>()};
  }
  params.batch = sizes[0].cast<int>(), params.tokens = sizes[1].cast<int>();
  params.heads = sizes[2].cast<int>(), params.dim = sizes[3].cast<int>();
  params.dtype = Dtype(dtype), params.out = rows_of(out), params.float32 = float32;
  if (!lse.is_none()) params.lse = rows_of(lse);
  params.sinks = pointer<const float>(sinks);
  Status status;
  {
    py::gil_scoped_release release;
    status = KVQUANT_CUDA_OR_REFUSE(cuda::merge(params, {device, pointer<void>(queue)}));
  }
  check(status, "merge");
}

}  // namespace

void define_pieces(py::module_& m) {
  m.def("read_pieces", &read_pieces);
  m.def("merge", &merge);
  m.attr("most_pieces") = kMostPieces;
  m.attr("most_merged") = kMostMerged;
}

}  // namespace kvquant::bindings
