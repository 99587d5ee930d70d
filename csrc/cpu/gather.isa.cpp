// Gather: dequantizes the rows that attention sees, for whoever needs them as they are.
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace kvquant::cpu::KVQUANT_ISA {
namespace {

constexpr int kTokens = 64;  // of an item of work

// Token `token` of a head in the caller's basis; zero where attention sees nothing.
template <class Format>
void gather_row(Format format, const GatherParams& p, const Paging& paging, const Young& young,
                int sequence, int head, bool is_key, int token, bool seen, float* x) {
  const CacheView& cache = p.cache;
  const RowsView& rows = is_key ? cache.k : cache.v;
  const int dim = rows.head_dim;
  const Place at = seen ? place_of(cache, p.seqs, paging, sequence, token) : Place{-1, 0};
  if (at.block < 0) {
    for (int c = 0; c < dim; c += kWidth) zero().store(x + c);
    return;
  }
  const uint16_t* const mean = is_key && cache.mean_group
                                   ? mean_of<uint16_t>(cache, p.seqs, paging, sequence, head, token)
                                   : nullptr;
  if (young.has(token)) {
    const int row = young.row(token);
    decode_row(Int8{}, young.codes(is_key, row), young_params(young, is_key, row), dim, mean, x);
    return rotate(x, dim, rows.rotation);
  }
  decode_row(
      format,
      rows_of<uint8_t>(rows.codes, at.block, head) + int64_t(at.row) * Format::code_bytes(dim),
      rows_of<typename Format::Params>(rows.params, at.block, head)[at.row], dim, mean, x);
  rotate(x, dim, rows.rotation);
}

}  // namespace

Status gather(const GatherParams& p, int threads) {
  const CacheView& cache = p.cache;
  const int tokens = p.seqs.max_seqlen_q;
  const int64_t pairs = int64_t(cache.num_kv_heads) * 2, chunks = ceil_div(tokens, kTokens);
  const int64_t elements =
      int64_t(p.seqs.batch) * tokens * cache.num_kv_heads * (cache.k.head_dim + cache.v.head_dim);
  return with_pair(cache.k.format, cache.v.format, [&](auto formats) {
    parallel(worth(threads, elements), p.seqs.batch * pairs * chunks, [&](int64_t item) {
      const int sequence = int(item / (pairs * chunks)), pair = int(item / chunks % pairs);
      const int head = pair / 2;
      const bool is_key = pair % 2 == 0;
      const Paging paging(cache, p.seqs.max_blocks);
      const int begin = int(item % chunks) * kTokens, end = least(tokens, begin + kTokens);
      const int first = first_token(p.seqs, sequence);
      const int length = stored_tokens(cache, p.seqs, p.seqs.seq_lens[sequence]);
      const Rows& to = is_key ? p.key : p.value;
      const Young young(cache, p.seqs, sequence, head,
                        open_start(most(1, age_group(cache, p.seqs)), length));
      alignas(64) float x[kMaxDim];
      with_rows(formats, is_key, [&](auto format) {
        for (int token = begin; token < end; ++token) {
          const bool seen = token >= first && token < length;
          gather_row(format, p, paging, young, sequence, head, is_key, token, seen, x);
          store_row(to.data,
                    sequence * to.batch_stride + token * to.token_stride + head * to.head_stride,
                    p.dtype, is_key ? cache.k.head_dim : cache.v.head_dim, x);
        }
      });
    });
    return Status::ok();
  });
}

}  // namespace kvquant::cpu::KVQUANT_ISA
