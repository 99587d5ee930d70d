// Append of rows by age. New rows take the place of those that are closed, so it is two launches,
// but for as few tokens as the ring has room for besides.
#include "kernels/append/ages.cuh"
#include "kernels/append/call.cuh"
#include "kernels/append/group_means.cuh"
#include "kernels/device.cuh"

namespace kvquant::cuda {
namespace {

constexpr int kCloseShares = 4;  // blocks that share a group that closes
constexpr int kOneWave = 512;    // blocks that a large GPU runs at once

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
  // Closes the block's share of the group that was open, unless it is the first, which stays young.
  __device__ __forceinline__ void close() const {
    if (!ages_.closes()) return;
    const Young young(p_.cache, p_.seqs, block_.sequence, block_.head, 0);
    close_share(young, ages_, int(blockIdx.x), int(gridDim.x), int(threadIdx.x / 32), kRowWarps,
                [&](bool is_key, auto&& f) { with_old(is_key, f); });
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

// What a launch does: it closes the group that was open, where the call begins another, writes the
// new rows, or both. One that only closes takes the mean of the group behind, too, from the rows
// whose place new ones will have.
struct AgedWork {
  bool closes, writes;
};

// grid: as BlockRows::grid(); where groups close (shares of a group, kv_heads, batch).
template <class Formats, class T>
__global__ void __launch_bounds__(kAppendThreads, 4)
    append_aged_kernel(const __grid_constant__ AppendParams p, AgedWork work) {
  __shared__ GroupScratch scratch;
  __shared__ CacheView slabs;
  let_next_launch_start();
  const BlockRows block(p);
  const int group = chunk_tokens(p.cache), length = block.length;
  const int total = length + call_rows(p.seqs, block.sequence).count;
  const int next = open_start(group, length) + group;  // behind the open group
  const bool writes = work.writes && block.begin < block.end;
  const bool ends = work.closes && length > 0 && next < total;  // the group that was open
  if (writes || ends) {
    share_young_view(p, slabs);
    const Aged<Formats, T> aged(p, slabs, block, total);
    // The mean of the group behind the open one comes from the launch that closes this.
    const bool is_known = !block.few && length > 0 && block.begin == next;
    if (writes && block.has_keys && !is_known) {
      aged.open(block.begin, block.end, scratch);
    } else if (!work.writes && blockIdx.x == 0) {
      aged.open(next, min(next + group, total), scratch);
    }
    if (writes) aged.write();
    if (ends) aged.close();
  }
  if (p.advance) advance_lengths<kAppendThreads>(p);
}

}  // namespace

Status append_aged(const AppendParams& params, bool closes, Launch launch) {
  const CacheView& cache = params.cache;
  const dim3 grid = BlockRows::grid(params);
  const bool few = BlockRows::are_few(params);
  const int64_t units = int64_t(params.seqs.batch) * cache.num_kv_heads;
  const dim3 shares(few && units * kCloseShares > kOneWave ? 1 : kCloseShares, grid.y,
                    unsigned(params.seqs.batch));
  AppendParams closing = params;
  closing.advance = nullptr;
  return with_pair(cache.k.format, cache.v.format, [&](auto formats) {
    using Formats = decltype(formats);
    if constexpr (can_age(Formats{})) {
      return launch_on(launch, [&](cudaStream_t stream) {
        dispatch_dtype(params.dtype, [&](auto* type) {
          using T = Sized<std::remove_pointer_t<decltype(type)>>;
          const auto run = [&](const AppendParams& p, dim3 grid, AgedWork work) {
            share_multiprocessors<append_aged_kernel<Formats, T>>(launch.device);
            append_aged_kernel<Formats, T><<<grid, kAppendThreads, 0, stream>>>(p, work);
          };
          if (few) return run(params, closes ? shares : grid, {closes, true});
          run(closing, shares, {true, false});
          run(params, grid, {false, true});
        });
      });
    } else {
      return Status::unsupported("8-bit rows have no age");
    }
  });
}

}  // namespace kvquant::cuda
