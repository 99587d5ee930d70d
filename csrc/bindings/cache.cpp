// append, attention and gather: the operations on a cache.
#include "bindings/bindings.h"
#include "kernels/attention/config.h"

namespace kvquant::bindings {
namespace {

// (address, block stride, head stride) of one tensor of the cache, strides in bytes.
Slab slab(py::handle tuple) {
  const auto t = py::reinterpret_borrow<py::tuple>(tuple);
  return {pointer<uint8_t>(t[0].cast<uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>()};
}

Rows rows(uintptr_t data, int64_t batch_stride, int64_t token_stride, int64_t head_stride) {
  return {pointer<void>(data), batch_stride, token_stride, head_stride};
}

CacheView view(py::tuple k_data, py::tuple v_data, py::tuple k_params, py::tuple v_params,
               py::tuple k_mean, int num_blocks, int kv_heads, int block_size, int k_dim, int v_dim,
               int group, int k_rotation, int v_rotation) {
  return {slab(k_data), slab(v_data), slab(k_params), slab(v_params), slab(k_mean),
          num_blocks,   kv_heads,     block_size,     k_dim,          v_dim,
          group,        k_rotation,   v_rotation};
}

Sequences sequences(uintptr_t block_table, int64_t block_table_stride, int batch, int max_blocks,
                    uintptr_t seq_lens, uintptr_t seq_starts, uintptr_t cu_seqlens, int rows,
                    int tokens) {
  return {pointer<const int32_t>(block_table),
          block_table_stride,
          batch,
          max_blocks,
          pointer<const int32_t>(seq_lens),
          pointer<const int32_t>(seq_starts),
          pointer<const int32_t>(cu_seqlens),
          rows,
          tokens};
}

void append(const CacheView& cache, uintptr_t block_table, int64_t block_table_stride, int batch,
            int max_blocks, uintptr_t seq_lens, uintptr_t seq_starts, uintptr_t cu_seqlens,
            int packed_rows, int tokens, uintptr_t key, int64_t k_batch, int64_t k_token,
            int64_t k_head, uintptr_t value, int64_t v_batch, int64_t v_token, int64_t v_head,
            int dtype, uintptr_t slot_mapping, bool advance, uintptr_t counter, int device,
            uintptr_t queue) {
  const AppendParams params{cache,
                            sequences(block_table, block_table_stride, batch, max_blocks, seq_lens,
                                      seq_starts, cu_seqlens, packed_rows, tokens),
                            rows(key, k_batch, k_token, k_head),
                            rows(value, v_batch, v_token, v_head),
                            Dtype(dtype),
                            pointer<const int64_t>(slot_mapping),
                            advance ? pointer<int32_t>(seq_lens) : nullptr,
                            pointer<int32_t>(counter)};
  KVQUANT_RUN(append, params, device, queue);
}

void attention(const CacheView& cache, uintptr_t block_table, int64_t block_table_stride, int batch,
               int max_blocks, uintptr_t seq_lens, uintptr_t seq_starts, uintptr_t cu_seqlens,
               int packed_rows, int tokens, uintptr_t query, int64_t q_batch, int64_t q_token,
               int64_t q_head, uintptr_t out, int64_t o_batch, int64_t o_token, int64_t o_head,
               int dtype, uintptr_t lse, int q_heads, float softmax_scale, bool causal,
               int sliding_window, float softcap, uintptr_t sinks, uintptr_t alibi_slopes,
               uintptr_t partial, uintptr_t counters, int splits, int split_size, int device,
               uintptr_t queue) {
  const AttentionParams params{cache,
                               sequences(block_table, block_table_stride, batch, max_blocks,
                                         seq_lens, seq_starts, cu_seqlens, packed_rows, tokens),
                               rows(query, q_batch, q_token, q_head),
                               rows(out, o_batch, o_token, o_head),
                               Dtype(dtype),
                               pointer<float>(lse),
                               q_heads,
                               softmax_scale,
                               causal,
                               sliding_window,
                               softcap,
                               pointer<const float>(sinks),
                               pointer<const float>(alibi_slopes),
                               pointer<float>(partial),
                               pointer<int32_t>(counters),
                               splits,
                               split_size};
  KVQUANT_RUN(attention, params, device, queue);
}

void gather(const CacheView& cache, uintptr_t block_table, int64_t block_table_stride, int batch,
            int max_blocks, uintptr_t seq_lens, uintptr_t seq_starts, int tokens, uintptr_t key,
            int64_t k_batch, int64_t k_token, int64_t k_head, uintptr_t value, int64_t v_batch,
            int64_t v_token, int64_t v_head, int dtype, int device, uintptr_t queue) {
  const GatherParams params{cache,
                            sequences(block_table, block_table_stride, batch, max_blocks, seq_lens,
                                      seq_starts, 0, 0, tokens),
                            rows(key, k_batch, k_token, k_head),
                            rows(value, v_batch, v_token, v_head), Dtype(dtype)};
  KVQUANT_RUN(gather, params, device, queue);
}

// A layer's cache and sequences, and what an attention on them needs besides.
struct Layer {
  CacheView cache;
  Sequences seqs;
  int splits;

  Layer(const CacheView& cache, uintptr_t block_table, int64_t block_table_stride, int batch,
        int max_blocks, uintptr_t seq_lens, uintptr_t seq_starts, int tokens, int splits)
      : cache(cache),
        seqs(sequences(block_table, block_table_stride, batch, max_blocks, seq_lens, seq_starts, 0,
                       0, tokens)),
        splits(splits) {}
};

// An append and an attention on tensors that look alike every time: only addresses change.
class Step {
 public:
  Step(py::tuple query, py::tuple key, py::tuple value, py::tuple out, int dtype, int q_heads,
       float softmax_scale, bool causal, int sliding_window, float softcap, int split_size) {
    append_.key = strided(key);
    append_.value = strided(value);
    attention_.query = strided(query);
    attention_.out = strided(out);
    append_.dtype = attention_.dtype = Dtype(dtype);
    attention_.q_heads = q_heads;
    attention_.softmax_scale = softmax_scale;
    attention_.causal = causal;
    attention_.sliding_window = sliding_window;
    attention_.softcap = softcap;
    attention_.split_size = split_size;
  }

  // False, and nothing done, if the stream is being captured and `shared` says that the scratch is
  // not this launch's own.
  bool run(const Layer& layer, uintptr_t query, uintptr_t key, uintptr_t value, uintptr_t out,
           uintptr_t partial, uintptr_t counters, bool shared, int device, uintptr_t queue) const {
#ifdef KVQUANT_WITH_CUDA
    if (device >= 0 && shared && cuda::capture_id(pointer<void>(queue))) return false;
#endif
    AppendParams append = append_;
    AttentionParams attention = attention_;
    append.cache = attention.cache = layer.cache;
    append.seqs = attention.seqs = layer.seqs;
    append.key.data = pointer<void>(key);
    append.value.data = pointer<void>(value);
    append.advance = const_cast<int32_t*>(layer.seqs.seq_lens);
    append.counter = attention.counters = pointer<int32_t>(counters);
    attention.query.data = pointer<void>(query);
    attention.out.data = pointer<void>(out);
    attention.partial = pointer<float>(partial);
    attention.splits = layer.splits;
    Status status;
    {
      py::gil_scoped_release release;
      if (device < 0) {
        status = cpu::append(append, int(queue));
        if (status.code == Status::kOk) status = cpu::attention(attention, int(queue));
      } else {
        status =
            KVQUANT_CUDA_OR_REFUSE(cuda::attend(append, attention, {device, pointer<void>(queue)}));
      }
    }
    check(status, "attend");
    return true;
  }

 private:
  // (batch, token, head) strides.
  static Rows strided(const py::tuple& s) {
    return rows(0, s[0].cast<int64_t>(), s[1].cast<int64_t>(), s[2].cast<int64_t>());
  }
  AppendParams append_{};
  AttentionParams attention_{};
};

// (splits, floats of partial results, counters) that an attention call needs on a CUDA device.
py::tuple attention_plan(int batch, int tokens, int q_heads, int kv_heads, int k_dim, int v_dim,
                         bool float32, int capacity, int multiprocessors, int split_size) {
  const cuda::AttentionPlan plan =
      cuda::plan_attention(cuda::shape_attention(batch, tokens, q_heads, kv_heads, k_dim, v_dim,
                                                 float32, capacity, multiprocessors),
                           batch, capacity, split_size);
  return py::make_tuple(plan.splits, plan.partial_floats, plan.counters);
}

uint64_t capture_id([[maybe_unused]] uintptr_t stream) {
#ifdef KVQUANT_WITH_CUDA
  return cuda::capture_id(pointer<void>(stream));
#else
  return 0;
#endif
}

// Addresses of partial results and of counters for the launches that a stream captures.
py::tuple lend_scratch(int device, uintptr_t stream, size_t floats, size_t counters) {
  cuda::Scratch scratch{};
  Status status;
  {
    py::gil_scoped_release release;
    status = KVQUANT_CUDA_OR_REFUSE(
        cuda::lend_scratch({device, pointer<void>(stream)}, floats, counters, scratch));
  }
  check(status, "lend_scratch");
  return py::make_tuple(uintptr_t(scratch.partial), uintptr_t(scratch.counters));
}

// (alone, head_dim, query rows, warps, blocks of a multiprocessor, stages) of the kernel's instance
// that such a call takes: see kernels/attention/config.h.
py::tuple attention_instance(int batch, int tokens, int q_heads, int kv_heads, int k_dim, int v_dim,
                             bool float32, int capacity, int multiprocessors) {
  const cuda::AttentionShape shape = cuda::shape_attention(
      batch, tokens, q_heads, kv_heads, k_dim, v_dim, float32, capacity, multiprocessors);
  const cuda::InstanceShape& instance = shape.instance;
  return py::make_tuple(shape.alone, shape.head_dim, shape.rows, instance.warps, instance.blocks,
                        instance.stages);
}

}  // namespace

// module_local: two copies of the package may be in one process.
void define_cache(py::module_& m) {
  py::class_<CacheView>(m, "CacheView", py::module_local()).def(py::init(&view));
  py::class_<Layer>(m, "Layer", py::module_local())
      .def(py::init<const CacheView&, uintptr_t, int64_t, int, int, uintptr_t, uintptr_t, int,
                    int>());
  py::class_<Step>(m, "Step", py::module_local())
      .def(py::init<py::tuple, py::tuple, py::tuple, py::tuple, int, int, float, bool, int, float,
                    int>())
      .def("run", &Step::run);
  m.def("append", &append);
  m.def("attention", &attention);
  m.def("gather", &gather);
  m.def("capture_id", &capture_id);
  m.def("lend_scratch", &lend_scratch);
  m.def("attention_plan", &attention_plan);
  m.def("attention_instance", &attention_instance);
}

}  // namespace kvquant::bindings
