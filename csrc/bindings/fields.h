// The fields of a call's objects, once: the bindings fill structs by these lists, and the package
// compares their names with its dataclasses when it is imported.
#pragma once

#include "bindings/bindings.h"
#include "formats/formats.h"

namespace kvquant::bindings {

// A view as Python has it.
struct ViewFields {
  CacheView view{};
  bool k_rotated = false, v_rotated = false;
};
struct OptionsFields {
  float softmax_scale, softcap;
  int32_t sliding_window, split_size;
  bool causal;
};
struct SequencesFields {
  Sequences seqs{};
  bool advance = false;
};

template <class V>
void fields(ViewFields& x, V&& v) {
  RowsView &keys = x.view.k, &values = x.view.v;
  v("k_codes", keys.codes), v("k_params", keys.params), v("k_head_dim", keys.head_dim);
  v("k_format", keys.format), v("k_rotated", x.k_rotated);
  v("v_codes", values.codes), v("v_params", values.params), v("v_head_dim", values.head_dim);
  v("v_format", values.format), v("v_rotated", x.v_rotated);
  v("mean", x.view.mean), v("mean_group", x.view.mean_group);
}
// What follows from a view's shapes.
template <class V>
void derived(ViewFields& x, V&& v) {
  CacheView& view = x.view;
  v("num_blocks", view.num_blocks), v("num_kv_heads", view.num_kv_heads);
  v("block_size", view.block_size);
}
static_assert(sizeof(RowsView) == 2 * sizeof(Slab) + 4 * sizeof(int32_t) &&
                  sizeof(CacheView) == 2 * sizeof(RowsView) + sizeof(Slab) + 4 * sizeof(int32_t),
              "a field more: list it above");

template <class V>
void fields(SequencesFields& x, V&& v) {
  Sequences& seqs = x.seqs;
  v("block_table", seqs.block_table), v("seq_lens", seqs.seq_lens);
  v("seq_starts", seqs.seq_starts), v("cu_seqlens_q", seqs.cu_seqlens_q);
  v("max_seqlen_q", seqs.max_seqlen_q), v("advance", x.advance), v("young", seqs.young);
}
template <class V>
void derived(SequencesFields& x, V&& v) {
  Sequences& seqs = x.seqs;
  v("table_stride", seqs.block_table_stride), v("batch", seqs.batch);
  v("max_blocks", seqs.max_blocks);
}
static_assert(sizeof(Sequences) ==
                  4 * sizeof(void*) + sizeof(int64_t) + 4 * sizeof(int32_t) + sizeof(Slab),
              "a field more: list it above");

template <class V>
void fields(OptionsFields& x, V&& v) {
  v("softmax_scale", x.softmax_scale), v("causal", x.causal);
  v("sliding_window", x.sliding_window), v("softcap", x.softcap), v("split_size", x.split_size);
}
template <class V>
void derived(OptionsFields&, V&&) {}

template <class V>
void fields(Problem& x, V&& v) {
  v("batch", x.batch), v("max_seqlen_q", x.max_seqlen_q), v("num_q_heads", x.num_q_heads);
  v("num_kv_heads", x.num_kv_heads), v("head_dim", x.head_dim), v("v_head_dim", x.v_head_dim);
  v("capacity", x.capacity), v("split_size", x.split_size);
  v("k_format", x.k_format), v("v_format", x.v_format), v("float32", x.float32);
  v("mean_group", x.mean_group), v("age_group", x.age_group);
  v("packed", x.packed), v("appends", x.appends);
  v("multiprocessors", x.multiprocessors), v("capability", x.capability);
}
template <class V>
void derived(Problem&, V&&) {}

inline void assign(py::handle from, Slab& to) {  // (address, block stride, head stride)
  const auto t = py::reinterpret_borrow<py::tuple>(from);
  to = {pointer<uint8_t>(t[0].cast<uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>()};
}
inline void assign(py::handle from, RowFormat& to) {  // by name
  const auto name = from.cast<std::string>();
  if (!find_format(RowFormats{}, name, to))
    throw py::value_error("no row format " + name + " in this build");
}
inline void assign(py::handle from, const int32_t*& to) {
  to = pointer<const int32_t>(from.cast<uintptr_t>());
}
template <class T>
void assign(py::handle from, T& to) {
  to = from.cast<T>();
}

// A struct from keywords, each of its fields among them.
template <class T>
T filled(const py::dict& from) {
  T x{};
  size_t count = 0;
  const auto take = [&](const char* name, auto& to) {
    if (!from.contains(name)) throw py::key_error(name);
    assign(from[name], to);
    ++count;
  };
  fields(x, take);
  derived(x, take);
  if (count != from.size()) throw py::key_error("a field that is none of the struct's");
  return x;
}

template <class T>
py::list names_of() {
  T x{};
  py::list names;
  fields(x, [&](const char* name, auto&) { names.append(name); });
  return names;
}

}  // namespace kvquant::bindings
