// The threads are those of the caller's own operations. After one of these an OpenMP runtime's
// workers spin for milliseconds, on cores that threads of ours would have to wait for (8 sequences
// of 4,096 tokens on two cores, between operations of torch: 6.5 ms with such threads, 4.9 so).
#include "cpu/threads.h"

#include <pthread.h>

#include <atomic>
#include <cstdlib>

namespace kvquant::cpu {
namespace {

constexpr size_t kKeptBytes = size_t(4) << 20;

std::atomic<Parallel> openmp{nullptr};

// Set while a job is under way. In a forked child for good: the runtime would wait for threads that
// the child does not have.
std::atomic<bool> busy{false};
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { busy = true; });

// The job, of the caller that set `busy`. Its memory is ordered by `next`, and not only by the
// runtime's barriers, which thread sanitizers do not see: a thread first reads it, and changes it
// last of all.
struct {
  Work work;
  void* context;
  int64_t count;
  int64_t share;              // a thread takes this part of the items that are left
  std::atomic<int64_t> next;  // item - count
} job;

// Takes runs of items, ever shorter ones, so that neighbours in memory go to one thread: two
// threads that took turns at 64 rows quantized no faster than one.
void take_items(void*) {
  for (int64_t i = job.next.load(std::memory_order_acquire); i < 0;) {
    const int64_t end = i + (-i + job.share - 1) / job.share;
    if (!job.next.compare_exchange_weak(i, end, std::memory_order_acquire)) continue;
    for (; i < end; ++i) job.work(job.context, job.count + i);
    i = job.next.load(std::memory_order_acquire);
  }
  job.next.fetch_add(0, std::memory_order_release);
}

struct Memory {
  void* data = nullptr;
  size_t bytes = 0;
  ~Memory() { release(); }
  void release() {
    std::free(data);
    data = nullptr, bytes = 0;
  }
};
thread_local Memory memories[2];

}  // namespace

void use_openmp(Parallel parallel) { openmp = parallel; }
bool has_threads() { return openmp != nullptr; }

void run_parallel(int threads, int64_t count, Work work, void* context) {
  const Parallel parallel = openmp;
  if (threads < 2 || count < 2 || !parallel || busy.exchange(true)) {
    for (int64_t i = 0; i < count; ++i) work(context, i);
    return;
  }
  job.work = work, job.context = context, job.count = count;
  job.share = 4 * int64_t(threads);
  job.next.store(-count, std::memory_order_release);
  // All threads, however few the items: the runtime ends threads that a smaller team leaves out.
  parallel(take_items, nullptr, unsigned(threads), 0);
  (void)job.next.load(std::memory_order_acquire);
  busy = false;
}

void* thread_scratch(Scratch slot, size_t bytes) {
  Memory& memory = memories[int(slot)];
  if (memory.bytes < bytes) {
    memory.release();
    bytes = (bytes + 4095) / 4096 * 4096;
    memory.data = std::aligned_alloc(64, bytes);
    memory.bytes = memory.data ? bytes : 0;
  }
  return memory.data;
}

void trim_scratch(Scratch slot) {
  Memory& memory = memories[int(slot)];
  if (memory.bytes > kKeptBytes) memory.release();
}

}  // namespace kvquant::cpu
