// Which tokens a sequence has, and which of the call's rows are its own. What lengths and offsets
// hold is not trusted: every answer is in bounds, and sums of them do not wrap.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "params.h"

namespace kvquant {

constexpr int kMostTokens = 1 << 30;  // of a sequence

// The tokens stored before a call, as far as the length may be believed.
KVQUANT_HD int checked_length(int seq_len) { return least(most(0, seq_len), kMostTokens); }

// The tokens stored for a sequence, and `more`, within its blocks.
KVQUANT_HD int stored_tokens(const CacheView& cache, const Sequences& seqs, int seq_len,
                             int more = 0) {
  const int capacity =
      int(least(int64_t(seqs.max_blocks) * cache.block_size, int64_t(kMostTokens)));
  return least(most(0, least(seq_len, capacity) + more), capacity);
}
// Behind the padding.
KVQUANT_HD int first_token(const Sequences& seqs, int sequence) {
  return seqs.seq_starts ? checked_length(seqs.seq_starts[sequence]) : 0;
}

// The call's rows of a sequence: the first one, and how many.
struct CallRows {
  int64_t first;
  int count;
};
KVQUANT_HD CallRows call_rows(const Sequences& seqs, int sequence) {
  if (!seqs.cu_seqlens_q) return {int64_t(sequence) * seqs.max_seqlen_q, seqs.max_seqlen_q};
  const int begin = most(0, seqs.cu_seqlens_q[sequence]);
  const int end = most(0, least(seqs.total_q, seqs.cu_seqlens_q[sequence + 1]));
  return {begin, most(0, least(seqs.max_seqlen_q, end - begin))};
}
// Element offset of row i of a sequence in the caller's tensor.
KVQUANT_HD int64_t row_offset(const Rows& rows, const Sequences& seqs, const CallRows& call,
                              int sequence, int i) {
  return seqs.cu_seqlens_q ? (call.first + i) * rows.token_stride
                           : sequence * rows.batch_stride + i * rows.token_stride;
}

}  // namespace kvquant
