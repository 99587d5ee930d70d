// append, attend and gather: the operations on a cache, by views, sequences and prepared calls.
#include "bindings/fields.h"
#include "common/groups.h"

namespace kvquant::bindings {
namespace {

CacheView view(const py::kwargs& given) {
  auto x = filled<ViewFields>(given);
  const auto rotation = [](const RowsView& rows, bool rotated) {
    return rotated ? rows.head_dim & -rows.head_dim : 1;
  };
  x.view.k.rotation = rotation(x.view.k, x.k_rotated);
  x.view.v.rotation = rotation(x.view.v, x.v_rotated);
  for (const Slab& slab :
       {x.view.k.codes, x.view.k.params, x.view.v.codes, x.view.v.params, x.view.mean}) {
    if (reinterpret_cast<uintptr_t>(slab.data) % 16) {
      throw py::value_error("a tensor of the view does not lie at a multiple of 16 bytes");
    }
  }
  return x.view;
}

// Sequences are dense with `tokens` rows each, or packed with at most as many of `rows`.
Sequences with_rows(const SequencesFields& x, int rows, int tokens) {
  Sequences seqs = x.seqs;
  seqs.total_q = seqs.cu_seqlens_q ? rows : 0;
  if (!seqs.cu_seqlens_q) {
    seqs.max_seqlen_q = tokens;
  } else {
    seqs.max_seqlen_q = seqs.max_seqlen_q ? std::min(seqs.max_seqlen_q, rows) : rows;
  }
  return seqs;
}

Rows rows_at(uintptr_t data, const Rows& strides) {
  return {pointer<void>(data), strides.batch_stride, strides.token_stride, strides.head_stride};
}
// (batch, token, head) strides.
Rows strided(const py::tuple& s) {
  return {nullptr, s[0].cast<int64_t>(), s[1].cast<int64_t>(), s[2].cast<int64_t>()};
}

// seqs None: rows go where slot_mapping says, whose they are does not matter.
void append(const CacheView& cache, const SequencesFields* given, int rows, int tokens,
            uintptr_t key, py::tuple key_strides, uintptr_t value, py::tuple value_strides,
            int dtype, uintptr_t slot_mapping, uintptr_t partial, uintptr_t counter, int device,
            uintptr_t queue) {
  Sequences seqs{};
  if (given) {
    seqs = with_rows(*given, rows, tokens);
  } else {
    seqs.batch = tokens ? rows / tokens : 0, seqs.max_seqlen_q = tokens;
  }
  const AppendParams params{cache,
                            seqs,
                            rows_at(key, strided(key_strides)),
                            rows_at(value, strided(value_strides)),
                            Dtype(dtype),
                            pointer<const int64_t>(slot_mapping),
                            given && given->advance ? const_cast<int32_t*>(seqs.seq_lens) : nullptr,
                            pointer<int32_t>(counter),
                            pointer<float>(partial)};
  KVQUANT_RUN(append, params, device, queue);
}

void gather(const CacheView& cache, const SequencesFields& given, int tokens, uintptr_t key,
            py::tuple key_strides, uintptr_t value, py::tuple value_strides, int dtype, int device,
            uintptr_t queue) {
  Sequences seqs = given.seqs;
  seqs.cu_seqlens_q = nullptr, seqs.max_seqlen_q = tokens;
  const GatherParams params{cache, seqs, rows_at(key, strided(key_strides)),
                            rows_at(value, strided(value_strides)), Dtype(dtype)};
  KVQUANT_RUN(gather, params, device, queue);
}

Choice choose_for(const Problem& problem) {
  return choose(problem, problem.multiprocessors ? cuda_regimes() : cpu_regimes());
}

py::dict describe(const Choice& choice) {
  py::dict found;
  py::list refusals;
  for (const Refusal& refusal : choice.refusals) {
    refusals.append(py::make_tuple(refusal.argument, refusal.why));
  }
  found["refusals"] = refusals;
  found["regime"] = choice.name ? py::object(py::str(choice.name)) : py::object(py::none());
  const Schedule& s = choice.schedule;
  found["splits"] = s.splits;
  found["appends"] = s.appends;
  found["partial_floats"] = s.partial_floats;
  found["counters"] = s.counters;
  found["query_rows"] = s.query_rows;
  found["warps"] = s.warps;
  found["blocks"] = s.blocks;
  found["stages"] = s.stages;
  found["head_dim"] = s.head_dim;
  return found;
}

// Where a call runs: a CUDA device's stream and the workspace for it, or a CPU's threads.
struct Place {
  int device;
  uintptr_t queue, partial, counters;
};

// An attention, and the append of its rows before it if there are any, on tensors that look alike
// every time: only addresses and objects change.
class Call {
 public:
  // key_strides empty: nothing is appended.
  Call(const py::dict& problem, const py::dict& options, int dtype, int key_dtype, int tokens,
       int key_tokens, py::tuple query_strides, py::tuple key_strides, py::tuple value_strides)
      : choice_(choose_for(filled<Problem>(problem))), tokens_(tokens), key_tokens_(key_tokens) {
    const auto numbers = filled<OptionsFields>(options);
    attention_.query = strided(query_strides);
    if (key_strides.size()) append_.key = strided(key_strides);
    if (key_strides.size()) append_.value = strided(value_strides);
    v_dim_ = problem["v_head_dim"].cast<int64_t>();
    out_token_ = v_dim_ * problem["num_q_heads"].cast<int64_t>();
    out_batch_ = out_token_ * tokens;
    attention_.dtype = Dtype(dtype), append_.dtype = Dtype(key_dtype);
    attention_.num_q_heads = problem["num_q_heads"].cast<int>();
    attention_.softmax_scale = numbers.softmax_scale;
    attention_.causal = numbers.causal;
    attention_.sliding_window = numbers.sliding_window;
    attention_.softcap = numbers.softcap;
    attention_.split_size = numbers.split_size;
    attention_.kernel = choice_.schedule.kernel;
    attention_.splits = choice_.schedule.splits;
  }

  py::dict choice() const { return describe(choice_); }

  // Of dense rows, without what run_all takes besides. False, and nothing done, where it takes
  // that, or the stream is being captured: the workspace is not that launch's own.
  bool run(const CacheView& cache, const SequencesFields& given, uintptr_t query, uintptr_t key,
           uintptr_t value, uintptr_t out, const Place& place) const {
#ifdef KVQUANT_WITH_CUDA
    if (place.device >= 0 && cuda::capture_id(pointer<void>(place.queue))) return false;
#endif
    if (!query) return false;
    launch(cache, given, 0, query, key, value, {pointer<void>(out), out_batch_, out_token_, v_dim_},
           {}, 0, place);
    return true;
  }
  // rows: packed rows there are. lens_after: the lengths with the call's tokens, where neither the
  // call advances them nor the kernel counts its own.
  void run_all(const CacheView& cache, const SequencesFields& given, int rows, uintptr_t query,
               uintptr_t key, uintptr_t value, uintptr_t out, py::tuple out_strides, uintptr_t lse,
               uintptr_t sinks, uintptr_t alibi_slopes, uintptr_t lens_after,
               const Place& place) const {
    Rows to = strided(out_strides);
    to.data = pointer<void>(out);
    launch(cache, given, rows, query, key, value, to,
           {pointer<float>(lse), pointer<const float>(sinks), pointer<const float>(alibi_slopes)},
           lens_after, place);
  }

 private:
  struct Vectors {
    float* lse = nullptr;
    const float *sinks = nullptr, *alibi_slopes = nullptr;
  };
  void launch(const CacheView& cache, const SequencesFields& given, int rows, uintptr_t query,
              uintptr_t key, uintptr_t value, const Rows& out, const Vectors& vectors,
              uintptr_t lens_after, const Place& place) const {
    AttentionParams attention = attention_;
    attention.cache = cache;
    attention.seqs = with_rows(given, rows, tokens_);
    attention.query.data = pointer<void>(query);
    attention.out = out;
    attention.lse = vectors.lse;
    attention.sinks = vectors.sinks;
    attention.alibi_slopes = vectors.alibi_slopes;
    attention.partial = pointer<float>(place.partial);
    attention.counters = pointer<int32_t>(place.counters);
    AppendParams append = append_;
    append.cache = cache;
    append.seqs = with_rows(given, rows, key_tokens_);
    append.key.data = pointer<void>(key);
    append.value.data = pointer<void>(value);
    append.advance = given.advance ? const_cast<int32_t*>(given.seqs.seq_lens) : nullptr;
    append.counter = attention.counters, append.partial = attention.partial;
    if (lens_after) attention.seqs.seq_lens = pointer<const int32_t>(lens_after);
    Status status;
    {
      py::gil_scoped_release release;
      if (!key) {
        status = KVQUANT_ON(attention, attention, place.device, place.queue);
      } else if (choice_.schedule.appends) {
        status = KVQUANT_CUDA_OR_REFUSE(
            cuda::attend(append, attention, {place.device, pointer<void>(place.queue)}));
      } else {
        status = KVQUANT_ON(append, append, place.device, place.queue);
        if (status.code == Status::kOk) {
          status = KVQUANT_ON(attention, attention, place.device, place.queue);
        }
      }
    }
    check(status, "attend");
  }

  Choice choice_;
  int tokens_, key_tokens_;                // of each sequence, dense
  int64_t v_dim_, out_token_, out_batch_;  // strides of a contiguous output
  AppendParams append_{};
  AttentionParams attention_{};
};

uint64_t capture_id([[maybe_unused]] uintptr_t stream) {
#ifdef KVQUANT_WITH_CUDA
  return cuda::capture_id(pointer<void>(stream));
#else
  return 0;
#endif
}

// Addresses of partial results and of counters for the launches that a stream captures.
py::tuple graph_workspace(int device, uintptr_t stream, size_t floats, size_t counters) {
  cuda::Scratch scratch{};
  Status status;
  {
    py::gil_scoped_release release;
    status = KVQUANT_CUDA_OR_REFUSE(
        cuda::graph_workspace({device, pointer<void>(stream)}, floats, counters, scratch));
  }
  check(status, "graph_workspace");
  return py::make_tuple(uintptr_t(scratch.partial), uintptr_t(scratch.counters));
}

py::dict field_names() {
  py::dict names;
  names["CacheView"] = names_of<ViewFields>();
  names["Sequences"] = names_of<SequencesFields>();
  names["Options"] = names_of<OptionsFields>();
  return names;
}

}  // namespace

// module_local: two copies of the package may be in one process.
void define_cache(py::module_& m) {
  py::class_<CacheView>(m, "CacheView", py::module_local()).def(py::init(&view));
  py::class_<SequencesFields>(m, "Sequences", py::module_local())
      .def(py::init([](const py::kwargs& given) {
        const auto x = filled<SequencesFields>(given);
        if (reinterpret_cast<uintptr_t>(x.seqs.young.data) % 16) {
          throw py::value_error("young does not lie at a multiple of 16 bytes");
        }
        return x;
      }));
  py::class_<Place>(m, "Place", py::module_local())
      .def(py::init([](int device, uintptr_t queue, uintptr_t partial, uintptr_t counters) {
        return Place{device, queue, partial, counters};
      }));
  py::class_<Call>(m, "Call", py::module_local())
      .def(py::init<const py::dict&, const py::dict&, int, int, int, int, py::tuple, py::tuple,
                    py::tuple>())
      .def("choice", &Call::choice)
      .def("run", &Call::run)
      .def("run_all", &Call::run_all);
  m.def("append", &append);
  m.def("append_floats", &append_floats);
  m.def("gather", &gather);
  m.def("choose",
        [](const py::dict& problem) { return describe(choose_for(filled<Problem>(problem))); });
  m.def("refuse_rows",
        [](const std::string& k_format, const std::string& v_format, int head_dim, int v_head_dim) {
          return refuse_rows(k_format, v_format, head_dim, v_head_dim);
        });
  m.def("capture_id", &capture_id);
  m.def("graph_workspace", &graph_workspace);
  m.def("fields", &field_names);
}

}  // namespace kvquant::bindings
