// Gather: dequantises the rows that attention sees, for whoever needs them as they are.
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace kvquant::cpu::KVQUANT_ISA {
namespace {

constexpr int kChunk = 64;  // tokens of an item of work

// Token `token` of a head in the caller's basis; zero where attention sees nothing.
void gather_row(const GatherParams& p, int sequence, int head, bool is_key, int64_t token,
                bool seen, float* x) {
  const CacheView& cache = p.cache;
  const int dim = is_key ? cache.k_dim : cache.v_dim;
  const Place at = seen ? place_of(cache, p.seqs, sequence, token) : Place{-1, 0};
  if (at.block < 0) {
    for (int c = 0; c < dim; c += kWidth) zero().store(x + c);
    return;
  }
  const uint16_t* mean = is_key && cache.group ? mean_of(cache, p.seqs, sequence, head,
                                                         token / cache.group * cache.group)
                                               : nullptr;
  const Slab& data = is_key ? cache.k_data : cache.v_data;
  const Slab& params = is_key ? cache.k_params : cache.v_params;
  decode_row(rows_of<uint8_t>(data, at.block, head) + at.row * dim,
             rows_of<uint16_t>(params, at.block, head) + 2 * at.row, dim, mean, x);
  rotate(x, dim, is_key ? cache.k_rotation : cache.v_rotation);
}

}  // namespace

Status gather(const GatherParams& p, int threads) {
  const CacheView& cache = p.cache;
  const int64_t pairs = int64_t(cache.kv_heads) * 2, chunks = ceil_div(p.seqs.tokens, kChunk);
  const int64_t elements =
      int64_t(p.seqs.batch) * p.seqs.tokens * cache.kv_heads * (cache.k_dim + cache.v_dim);
  parallel(worth(threads, elements), p.seqs.batch * pairs * chunks, [&](int64_t item) {
    const int sequence = int(item / (pairs * chunks)), pair = int(item / chunks % pairs);
    const int head = pair / 2;
    const bool is_key = pair % 2 == 0;
    const int64_t begin = item % chunks * kChunk;
    const int64_t end = least<int64_t>(p.seqs.tokens, begin + kChunk);
    const int first = first_token(p.seqs, sequence);
    const int length = stored_tokens(cache, p.seqs, p.seqs.seq_lens[sequence]);
    const Rows& rows = is_key ? p.key : p.value;
    alignas(64) float x[kMaxDim];
    for (int64_t token = begin; token < end; ++token) {
      gather_row(p, sequence, head, is_key, token, token >= first && token < length, x);
      store_row(rows.data,
                sequence * rows.batch_stride + token * rows.token_stride + head * rows.head_stride,
                p.dtype, is_key ? cache.k_dim : cache.v_dim, x);
    }
  });
  return Status::ok();
}

}  // namespace kvquant::cpu::KVQUANT_ISA
