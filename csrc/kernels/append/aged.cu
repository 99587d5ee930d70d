// Append of rows by age. Long calls write new rows over those that the mean of the next group is
// taken of, so with key means they are two launches.
#include "kernels/append/ages.cuh"
#include "kernels/append/call.cuh"
#include "kernels/append/group_means.cuh"
#include "kernels/device.cuh"

namespace kvquant::cuda {
namespace {

// The view of young rows, in shared memory: a thread's own would be in local memory, and written
// time and again. All threads must call.
__device__ __forceinline__ void share_young_view(const AppendParams& p, CacheView& slabs) {
  if (threadIdx.x == 0) slabs = young_view(p.cache, p.seqs);
  __syncthreads();
}

// A block's part of an append by age.
template <class Formats, class T>
class Aged {
 public:
  __device__ __forceinline__ Aged(const AppendParams& p, const CacheView& slabs,
                                  const BlockRows& block, int total)
      : p_(p), slabs_(slabs), block_(block), ages_(p.cache, block.length, total - block.length) {}

  // Takes the means of the groups of tokens [begin, end) that begin in this call.
  __device__ __forceinline__ void open(int begin, int end, GroupScratch& scratch) const {
    open_groups<kAppendThreads>(young(true), begin, end, scratch);
  }
  __device__ __forceinline__ void write() const {
    write_aged(
        young(block_.is_key), [&](auto&& f) { with_old(block_.is_key, f); }, ages_, block_.few,
        block_.begin, block_.end, block_.warp, block_.warps);
  }

 private:
  const AppendParams& p_;
  const CacheView& slabs_;
  const BlockRows& block_;
  const Ages ages_;

  __device__ __forceinline__ Source<Int8, T> young(bool is_key) const {
    return source_of<Int8, T>(p_, slabs_, is_key, block_.sequence, block_.head, ages_.group);
  }
  // Calls f with the source of the old rows.
  template <class F>
  __device__ __forceinline__ void with_old(bool is_key, F&& f) const {
    with_rows(Formats{}, is_key, [&](auto format) {
      f(source_of<decltype(format), T>(p_, p_.cache, is_key, block_.sequence, block_.head));
    });
  }
};

// grid: as BlockRows::grid(). only_mean: (1, kv_heads, batch), for the mean of the group behind the
// open one, from the rows whose place new ones will have.
template <class Formats, class T>
__global__ void __launch_bounds__(kAppendThreads, 4)
    append_aged_kernel(const __grid_constant__ AppendParams p, bool only_mean) {
  __shared__ GroupScratch scratch;
  __shared__ CacheView slabs;
  let_next_launch_start();
  const BlockRows block(p);
  const int group = chunk_tokens(p.cache), length = block.length;
  const int total = length + call_rows(p.seqs, block.sequence).count;
  const int next = open_start(group, length) + group;  // behind the open group
  const bool writes = !only_mean && block.begin < block.end;
  const bool begins_next = length > 0 && next < total;
  if (writes || (only_mean && begins_next)) {
    share_young_view(p, slabs);
    const Aged<Formats, T> aged(p, slabs, block, total);
    const bool is_known = !block.few && begins_next && block.begin == next;
    if (only_mean) {
      aged.open(next, min(next + group, total), scratch);
    } else if (block.has_keys && !is_known) {
      aged.open(block.begin, block.end, scratch);
    }
    if (writes) aged.write();
  }
  if (p.advance) advance_lengths<kAppendThreads>(p);
}

}  // namespace

Status append_aged(const AppendParams& params, Launch launch) {
  const CacheView& cache = params.cache;
  const dim3 grid = BlockRows::grid(params);
  AppendParams before = params;
  before.advance = nullptr;
  return with_pair(cache.k.format, cache.v.format, [&](auto formats) {
    using Formats = decltype(formats);
    if constexpr (can_age(Formats{})) {
      return launch_on(launch, [&](cudaStream_t stream) {
        dispatch_dtype(params.dtype, [&](auto* type) {
          using T = Sized<std::remove_pointer_t<decltype(type)>>;
          const auto run = [&](const AppendParams& p, dim3 grid, bool only_mean) {
            share_multiprocessors<append_aged_kernel<Formats, T>>(launch.device);
            append_aged_kernel<Formats, T><<<grid, kAppendThreads, 0, stream>>>(p, only_mean);
          };
          if (cache.mean_group && !BlockRows::are_few(params)) {
            run(before, dim3(1, grid.y, unsigned(params.seqs.batch)), true);
          }
          run(params, grid, false);
        });
      });
    } else {
      return Status::unsupported("8-bit rows have no age");
    }
  });
}

}  // namespace kvquant::cuda
