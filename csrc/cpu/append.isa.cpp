// Append: rotate, subtract the group's mean, quantize and scatter K and V.
//
// An item of work is one head's rows of one group (or of 256 tokens without a mean), K or V. Where
// the group begins in this call, the item first takes its mean: of the incoming rows of the group
// before and of those that are stored. So no item waits for another; the incoming rows are read
// twice, the second time from the cache.
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace kvquant::cpu::KVQUANT_ISA {
namespace {

// One head of one sequence, K or V.
template <class Format>
struct Source {
  const AppendParams& p;
  const Rows& rows;
  const RowsView& view;
  int dim;
  int sequence, head;
  CallRows call;
  int length;  // tokens stored before the call
  Paging paging;

  Source(Format, const AppendParams& p, int sequence, int head, bool is_key)
      : p(p),
        rows(is_key ? p.key : p.value),
        view(is_key ? p.cache.k : p.cache.v),
        dim(view.head_dim),
        sequence(sequence),
        head(head),
        call(call_rows(p.seqs, sequence)),
        length(p.seqs.seq_lens ? checked_length(p.seqs.seq_lens[sequence]) : 0),
        paging(p.cache, p.seqs.max_blocks) {}

  void load(int i, float* x) const {
    load_row(rows.data, row_offset(rows, p.seqs, call, sequence, i) + head * rows.head_stride,
             p.dtype, dim, x);
  }
  Place stored(int64_t token) const { return place_of(p.cache, p.seqs, paging, sequence, token); }
  // Where incoming row i goes.
  Place place(int i) const {
    if (p.slot_mapping) return place_of_slot(p.cache, p.slot_mapping[call.first + i]);
    return stored(int64_t(length) + i);
  }
  uint16_t* mean_at(int64_t token) const {
    return mean_of<uint16_t>(p.cache, p.seqs, paging, sequence, head, token);
  }
  uint8_t* codes(Place at) const {
    return rows_of<uint8_t>(view.codes, at.block, head) + int64_t(at.row) * Format::code_bytes(dim);
  }
  typename Format::Params& params(Place at) const {
    return rows_of<typename Format::Params>(view.params, at.block, head)[at.row];
  }
};

bool is_finite(const float* x, int dim) {
  Range range;
  for (int c = 0; c < dim; c += kWidth) range.add(Vec::load(x + c));
  return all(in_range(range.lowest(), range.high));
}
void add_to(float* sum, const float* x, int dim) {
  for (int c = 0; c < dim; c += kWidth) (Vec::load(sum + c) + Vec::load(x + c)).store(sum + c);
}

// The mean of the usable rows of tokens [begin, end), rotated; returns how many there were.
template <class Format>
int mean_of_rows(const Source<Format>& src, int64_t begin, int64_t end, float* mean) {
  alignas(64) float incoming[kMaxDim] = {}, stored[kMaxDim] = {}, x[kMaxDim];
  int count = 0;
  end = least<int64_t>(end, int64_t(src.length) + src.call.count);
  for (int64_t token = most<int64_t>(begin, first_token(src.p.seqs, src.sequence)); token < end;
       ++token) {
    if (token >= src.length) {
      const int i = int(token - src.length);
      if (src.place(i).block < 0) continue;
      src.load(i, x);
      if (!is_finite(x, src.dim)) continue;
      add_to(incoming, x, src.dim);
    } else {
      const Place at = src.stored(token);
      if (at.block < 0) continue;
      const auto params = src.params(at);
      const float scale = Format::affine(params).scale;
      if (scale != scale) continue;
      decode_row(Format{}, src.codes(at), params, src.dim, src.mean_at(token), x);
      add_to(stored, x, src.dim);
    }
    ++count;
  }
  if (count == 0) return 0;
  rotate(incoming, src.dim, src.view.rotation);  // of a sum: once, not once a row
  const Vec rows = Vec::set(float(count));
  for (int c = 0; c < src.dim; c += kWidth) {
    ((Vec::load(incoming + c) + Vec::load(stored + c)) / rows).store(mean + c);
  }
  return count;
}

// Leaves the mean of the group of tokens [start, end) in mean[dim], as stored. A mean that has no
// place counts as zero, as it does for those who read.
template <class Format>
void group_mean(const Source<Format>& src, int64_t start, int64_t end, float* mean) {
  uint16_t* slot = src.mean_at(start);
  if (slot && start >= src.length) {
    const bool found =
        start > 0 && mean_of_rows(src, start - src.p.cache.mean_group, start, mean) > 0;
    const bool own = !found && mean_of_rows(src, start, end, mean) >= kMinMeanRows;
    for (int c = 0; c < src.dim; c += kWidth) {
      const Vec x = found || own ? Vec::load(mean + c) : zero();
      clamp(x, -kMaxAbs, kMaxAbs).store_half(slot + c);
    }
  }
  for (int c = 0; c < src.dim; c += kWidth) {
    (slot ? Vec::load_half(slot + c) : zero()).store(mean + c);
  }
}

template <class Format>
void write_row(const Source<Format>& src, const float* mean, Place to, float* x) {
  const bool finite = is_finite(x, src.dim);
  rotate(x, src.dim, src.view.rotation);
  Range range;
  for (int c = 0; c < src.dim; c += kWidth) {
    const Vec y = mean ? Vec::load(x + c) - Vec::load(mean + c) : Vec::load(x + c);
    y.store(x + c);
    range.add(y);
  }
  const auto params = Format::params(reduce_min(range.low), reduce_max(range.high), finite);
  const RowAffine affine = Format::affine(params);
  const Vec offset = Vec::set(affine.offset), inverse = Vec::set(1.f / affine.scale);
  uint8_t* const codes = src.codes(to);
  for (int c = 0; c < src.dim; c += kWidth) {  // a NaN becomes 0
    const Vec code = clamp((Vec::load(x + c) - offset) * inverse, 0.f, Format::kMaxCode);
    Codes<Format>::store(codes, c, code);
  }
  src.params(to) = params;
}

}  // namespace

Status append(const AppendParams& p, int threads) {
  const CacheView& cache = p.cache;
  const int64_t tokens = p.seqs.max_seqlen_q, pairs = int64_t(cache.num_kv_heads) * 2;
  const int64_t chunks = chunks_of(cache, p.seqs.max_seqlen_q);
  const int64_t elements =
      p.seqs.batch * tokens * cache.num_kv_heads * (cache.k.head_dim + cache.v.head_dim);
  if (tokens == 0) return Status::ok();
  const Status status = with_pair(cache.k.format, cache.v.format, [&](auto formats) {
    parallel(worth(threads, elements), p.seqs.batch * pairs * chunks, [&](int64_t item) {
      const int sequence = int(item / (pairs * chunks)), pair = int(item / chunks % pairs);
      const bool is_key = pair % 2 == 0;
      with_rows(formats, is_key, [&](auto format) {
        const Source src(format, p, sequence, pair / 2, is_key);
        const Chunk chunk = chunk_of(cache, src.length, src.call.count, int(item % chunks));
        if (chunk.begin >= chunk.end) return;
        alignas(64) float mean[kMaxDim], x[kMaxDim];
        const bool has_mean = is_key && cache.mean_group;
        if (has_mean) group_mean(src, chunk.start, chunk.end, mean);
        for (int token = chunk.begin; token < chunk.end; ++token) {
          const Place to = src.place(token - src.length);
          if (to.block < 0) continue;
          src.load(token - src.length, x);
          write_row(src, has_mean ? mean : nullptr, to, x);
        }
      });
    });
    return Status::ok();
  });
  if (p.advance && status.code == Status::kOk) {
    for (int b = 0; b < p.seqs.batch; ++b) p.advance[b] += call_rows(p.seqs, b).count;
  }
  return status;
}

}  // namespace kvquant::cpu::KVQUANT_ISA
