// Append: rotate, subtract the group's mean, quantise and scatter K and V.
//
// An item of work is one head's rows of one group (or of 256 tokens without a mean), K or V. Where
// the group begins in this call, the item first takes its mean: of the incoming rows of the group
// before and of those that are stored. So no item waits for another; the incoming rows are read
// twice, the second time from the cache.
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace kvquant::cpu::KVQUANT_ISA {
namespace {

constexpr int kChunk = 256;  // tokens of an item where the format has no mean

// One head of one sequence, K or V.
struct Source {
  const AppendParams& p;
  const Rows& rows;
  const Slab &data, &params;
  int dim, rotation;
  int sequence, head;
  CallRows call;
  int64_t length;  // tokens stored before the call

  Source(const AppendParams& p, int sequence, int head, bool is_key)
      : p(p),
        rows(is_key ? p.key : p.value),
        data(is_key ? p.cache.k_data : p.cache.v_data),
        params(is_key ? p.cache.k_params : p.cache.v_params),
        dim(is_key ? p.cache.k_dim : p.cache.v_dim),
        rotation(is_key ? p.cache.k_rotation : p.cache.v_rotation),
        sequence(sequence),
        head(head),
        call(call_rows(p.seqs, sequence)),
        length(p.seqs.seq_lens ? checked_length(p.seqs.seq_lens[sequence]) : 0) {}

  void load(int i, float* x) const {
    load_row(rows.data, row_offset(rows, p.seqs, call, sequence, i) + head * rows.head_stride,
             p.dtype, dim, x);
  }
  Place stored(int64_t token) const { return place_of(p.cache, p.seqs, sequence, token); }
  // Where incoming row i goes.
  Place place(int i) const {
    if (!p.slot_mapping) return stored(length + i);
    const int64_t slot = p.slot_mapping[call.first + i];
    const int64_t block = slot / p.cache.block_size;
    if (slot < 0 || block >= p.cache.num_blocks) return {-1, 0};
    return {int(block), slot - block * p.cache.block_size};
  }
  uint16_t* mean_at(int64_t token) const { return mean_of(p.cache, p.seqs, sequence, head, token); }
};

bool is_finite(const float* x, int dim) {
  Range range;
  for (int c = 0; c < dim; c += kWidth) range.add(Vec::load(x + c));
  return all(in_range(range.lowest(), range.high));
}
void add_to(float* sum, const float* x, int dim) {
  for (int c = 0; c < dim; c += kWidth) (Vec::load(sum + c) + Vec::load(x + c)).store(sum + c);
}

// The mean of the usable rows of tokens [begin, end), rotated; returns how many there were.
int mean_of_rows(const Source& src, int64_t begin, int64_t end, float* mean) {
  alignas(64) float incoming[kMaxDim] = {}, stored[kMaxDim] = {}, x[kMaxDim];
  int count = 0;
  const int group = src.p.cache.group;
  end = least(end, src.length + src.call.count);
  for (int64_t token = most<int64_t>(begin, first_token(src.p.seqs, src.sequence)); token < end;
       ++token) {
    if (token >= src.length) {
      const int i = int(token - src.length);
      if (src.place(i).block < 0) continue;
      src.load(i, x);
      if (!is_finite(x, src.dim)) continue;
      add_to(incoming, x, src.dim);
    } else {
      const Place at = src.stored(token);
      if (at.block < 0) continue;
      const uint16_t* row = rows_of<uint16_t>(src.params, at.block, src.head) + 2 * at.row;
      if ((row[0] & 0x7fff) > 0x7c00) continue;
      decode_row(rows_of<uint8_t>(src.data, at.block, src.head) + at.row * src.dim, row, src.dim,
                 src.mean_at(token / group * group), x);
      add_to(stored, x, src.dim);
    }
    ++count;
  }
  if (count == 0) return 0;
  rotate(incoming, src.dim, src.rotation);  // of a sum: once, not once a row
  const Vec rows = Vec::set(float(count));
  for (int c = 0; c < src.dim; c += kWidth) {
    ((Vec::load(incoming + c) + Vec::load(stored + c)) / rows).store(mean + c);
  }
  return count;
}

// Leaves the mean of the group of tokens [start, end) in mean[dim], as stored. A mean that has no
// place counts as zero, as it does for those who read.
void group_mean(const Source& src, int64_t start, int64_t end, float* mean) {
  uint16_t* slot = src.mean_at(start);
  if (slot && start >= src.length) {
    const bool found = start > 0 && mean_of_rows(src, start - src.p.cache.group, start, mean) > 0;
    const bool own = !found && mean_of_rows(src, start, end, mean) >= int8::kMinMeanRows;
    for (int c = 0; c < src.dim; c += kWidth) {
      const Vec x = found || own ? Vec::load(mean + c) : zero();
      clamp(x, -int8::kMaxAbs, int8::kMaxAbs).store_half(slot + c);
    }
  }
  for (int c = 0; c < src.dim; c += kWidth) {
    (slot ? Vec::load_half(slot + c) : zero()).store(mean + c);
  }
}

void write_row(const Source& src, const float* mean, Place to, float* x) {
  const bool finite = is_finite(x, src.dim);
  rotate(x, src.dim, src.rotation);
  Range range;
  for (int c = 0; c < src.dim; c += kWidth) {
    const Vec y = mean ? Vec::load(x + c) - Vec::load(mean + c) : Vec::load(x + c);
    y.store(x + c);
    range.add(y);
  }
  const int8::RowParams row =
      int8::row_params(reduce_min(range.low), reduce_max(range.high), finite);
  const Vec offset = Vec::set(int8::half_to_float(row.offset));
  const Vec inverse = Vec::set(1.f / int8::half_to_float(row.scale));
  uint8_t* codes = rows_of<uint8_t>(src.data, to.block, src.head) + to.row * src.dim;
  for (int c = 0; c < src.dim; c += kWidth) {  // a NaN becomes 0
    clamp((Vec::load(x + c) - offset) * inverse, 0.f, 255.f).store_codes(codes + c);
  }
  uint16_t* params = rows_of<uint16_t>(src.params, to.block, src.head) + 2 * to.row;
  params[0] = row.scale, params[1] = row.offset;
}

}  // namespace

Status append(const AppendParams& p, int threads) {
  const CacheView& cache = p.cache;
  const int64_t tokens = p.seqs.tokens, pairs = int64_t(cache.kv_heads) * 2;
  const int chunk = cache.group ? cache.group : kChunk;
  const int64_t chunks = (tokens + chunk - 2) / chunk + 1;  // however the call's rows lie in them
  const int64_t elements = p.seqs.batch * tokens * cache.kv_heads * (cache.k_dim + cache.v_dim);
  if (tokens == 0) return Status::ok();
  parallel(worth(threads, elements), p.seqs.batch * pairs * chunks, [&](int64_t item) {
    const int sequence = int(item / (pairs * chunks)), pair = int(item / chunks % pairs);
    const bool is_key = pair % 2 == 0;
    const Source src(p, sequence, pair / 2, is_key);
    const int64_t start = (src.length / chunk + item % chunks) * chunk;
    const int64_t begin = most(start, src.length);
    const int64_t end = least(start + chunk, src.length + src.call.count);
    if (begin >= end) return;
    alignas(64) float mean[kMaxDim], x[kMaxDim];
    const bool has_mean = is_key && cache.group;
    if (has_mean) group_mean(src, start, end, mean);
    for (int64_t token = begin; token < end; ++token) {
      const int i = int(token - src.length);
      const Place to = src.place(i);
      if (to.block < 0) continue;
      src.load(i, x);
      write_row(src, has_mean ? mean : nullptr, to, x);
    }
  });
  if (p.advance) {
    for (int b = 0; b < p.seqs.batch; ++b) p.advance[b] += call_rows(p.seqs, b).count;
  }
  return Status::ok();
}

}  // namespace kvquant::cpu::KVQUANT_ISA
