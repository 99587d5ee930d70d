#include "cpu/pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace kvquant::cpu {
namespace {

constexpr int kMaxThreads = 256;
constexpr size_t kKeptBytes = size_t(4) << 20;
constexpr int kSpins = 2000;  // about 20 us: the time between the launches of a decode step's ops

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One job at a time. `tickets` is the door: a worker that takes one has joined the job. The caller
// shuts the door when the items have run out and then waits for those inside only, so a worker that
// the system is slow to wake costs nothing.
class Pool {
 public:
  void run(int threads, int64_t count, Work work, void* context) {
    const int helpers = int(count - 1 < threads - 1 ? count - 1 : threads - 1);
    if (helpers <= 0 || busy_.exchange(true, std::memory_order_acquire)) {
      for (int64_t i = 0; i < count; ++i) work(context, i);
      return;
    }
    start_workers(helpers < kMaxThreads ? helpers : kMaxThreads);
    work_ = work, context_ = context, count_ = count;
    next_.store(0, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const int tickets = helpers < workers_ ? helpers : workers_;
    tickets_.store(tickets, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    take_items();
    const int joined = tickets - tickets_.exchange(0, std::memory_order_acq_rel);
    wait_for(joined);
    busy_.store(false, std::memory_order_release);
  }

 private:
  void start_workers(int wanted) {
    for (; workers_ < wanted; ++workers_) {
      try {
        std::thread([this] { work_forever(); }).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: fewer do the work
      }
    }
  }

  void take_items() {
    const Work work = work_;
    void* const context = context_;
    const int64_t count = count_;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) work(context, i);
  }

  bool take_ticket() {
    int tickets = tickets_.load(std::memory_order_seq_cst);
    while (tickets > 0) {
      if (tickets_.compare_exchange_weak(tickets, tickets - 1, std::memory_order_acq_rel)) {
        return true;
      }
    }
    return false;
  }

  void join_job() {
    bool joined = false;
    for (int i = 0; i < kSpins && !(joined = take_ticket()); ++i) pause();
    if (joined) return;
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    wake_.wait(lock, [this] { return take_ticket(); });
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
  }

  void work_forever() {
    for (;;) {
      join_job();
      take_items();
      done_.fetch_add(1, std::memory_order_seq_cst);
      if (caller_sleeps_.load(std::memory_order_seq_cst)) {
        std::lock_guard<std::mutex> lock(mutex_);
        finished_.notify_one();
      }
    }
  }

  void wait_for(int joined) {
    for (int i = 0; i < kSpins; ++i) {
      if (done_.load(std::memory_order_acquire) == joined) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    caller_sleeps_.store(true, std::memory_order_seq_cst);
    finished_.wait(lock, [&] { return done_.load(std::memory_order_seq_cst) == joined; });
    caller_sleeps_.store(false, std::memory_order_relaxed);
  }

  // The job. Written while no ticket is out, read by those who took one.
  Work work_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
  int workers_ = 0;  // only the caller that holds busy_ touches it

  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> tickets_{0};
  alignas(64) std::atomic<int> done_{0};
  std::atomic<bool> busy_{false};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::mutex mutex_;
  std::condition_variable wake_, finished_;
};

// Never destroyed: at exit the workers may still be asleep in it. A forked child has none of the
// threads, and perhaps a lock that one of them held: it starts afresh.
alignas(Pool) unsigned char storage[sizeof(Pool)];
Pool* pool() { return std::launder(reinterpret_cast<Pool*>(storage)); }
void reset() { new (storage) Pool; }
[[maybe_unused]] const bool started = [] {
  reset();
  pthread_atfork(nullptr, nullptr, &reset);
  return true;
}();

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

void run_parallel(int threads, int64_t count, Work work, void* context) {
  pool()->run(threads, count, work, context);
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
