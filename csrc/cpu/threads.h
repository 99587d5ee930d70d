// Work on several threads, and memory that a thread keeps.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvquant::cpu {

// GOMP_parallel of an OpenMP runtime (GNU's, LLVM's and Intel's have it): calls body(data) on
// `threads` threads, of which the caller is one.
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// Whose threads run_parallel() uses; null, as at first: none but the caller's.
void use_openmp(Parallel parallel);
bool has_threads();

// Calls work(context, i) for every i in [0, count), in no order; returns when all are done. While
// another caller's work is under way, and in a forked child, which has no other threads, the caller
// does its own alone.
using Work = void (*)(void* context, int64_t i);
void run_parallel(int threads, int64_t count, Work work, void* context);

// Memory of the calling thread, 64-byte aligned, kept for its next call; null: out of memory. The
// two slots are apart: kCall for what a call shares between threads, kWorker for a thread's own.
// trim_scratch() gives back what is too much to keep, when the call is done.
enum class Scratch { kCall, kWorker };
void* thread_scratch(Scratch slot, size_t bytes);
void trim_scratch(Scratch slot);

}  // namespace kvquant::cpu
