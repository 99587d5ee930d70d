// A small pool of threads that lives as long as the process, so that a decode step starts none.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvquant::cpu {

// Calls work(context, i) for every i in [0, count), in no order, on at most `threads` threads of
// which the caller is one. Returns when all are done. A call that finds the pool busy with another
// caller's work does its own alone.
using Work = void (*)(void* context, int64_t i);
void run_parallel(int threads, int64_t count, Work work, void* context);

// Memory of the calling thread, 64-byte aligned, kept for its next call; null: out of memory. The
// two slots are apart: kCall for what a call shares between threads, kWorker for a thread's own.
// trim_scratch() gives back what is too much to keep, when the call is done.
enum class Scratch { kCall, kWorker };
void* thread_scratch(Scratch slot, size_t bytes);
void trim_scratch(Scratch slot);

}  // namespace kvquant::cpu
