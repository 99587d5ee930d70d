// Append: rotate, subtract the group's mean, quantize and scatter K and V.
//
// An item of work is one head's rows of one group (or of 256 tokens without a mean), K or V. Where
// the group begins in this call, the item first takes its mean: of the incoming rows of the group
// before and of those that are stored. So no item waits for another; the incoming rows are read
// twice, the second time from the cache.
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace kvquant::cpu::KVQUANT_ISA {
namespace {

// One head of one sequence, K or V.
template <class Format>
struct Source {
  const AppendParams& p;
  const Rows& rows;
  const RowsView& view;
  int dim;
  int sequence, head;
  CallRows call;
  int length;  // tokens stored before the call
  Paging paging;
  Young young;  // by age: of what is stored

  Source(Format, const AppendParams& p, int sequence, int head, bool is_key)
      : p(p),
        rows(is_key ? p.key : p.value),
        view(is_key ? p.cache.k : p.cache.v),
        dim(view.head_dim),
        sequence(sequence),
        head(head),
        call(call_rows(p.seqs, sequence)),
        length(p.seqs.seq_lens ? checked_length(p.seqs.seq_lens[sequence]) : 0),
        paging(p.cache, p.seqs.max_blocks),
        young(p.cache, p.seqs, sequence, head,
              open_start(most(1, age_group(p.cache, p.seqs)), length)) {}

  void load(int i, float* x) const {
    load_row(rows.data, row_offset(rows, p.seqs, call, sequence, i) + head * rows.head_stride,
             p.dtype, dim, x);
  }
  Place stored(int64_t token) const { return place_of(p.cache, p.seqs, paging, sequence, token); }
  // Where incoming row i goes.
  Place place(int i) const {
    if (p.slot_mapping) return place_of_slot(p.cache, p.slot_mapping[call.first + i]);
    return stored(int64_t(length) + i);
  }
  uint16_t* mean_at(int64_t token) const {
    return mean_of<uint16_t>(p.cache, p.seqs, paging, sequence, head, token);
  }
  uint8_t* codes(Place at) const {
    return rows_of<uint8_t>(view.codes, at.block, head) + int64_t(at.row) * Format::code_bytes(dim);
  }
  typename Format::Params& params(Place at) const {
    return rows_of<typename Format::Params>(view.params, at.block, head)[at.row];
  }
};

bool is_finite(const float* x, int dim) {
  Range range;
  for (int c = 0; c < dim; c += kWidth) range.add(Vec::load(x + c));
  return all(in_range(range.lowest(), range.high));
}
void add_to(float* sum, const float* x, int dim) {
  for (int c = 0; c < dim; c += kWidth) (Vec::load(sum + c) + Vec::load(x + c)).store(sum + c);
}

// A stored key in the basis it is stored in; false: it is not finite.
template <class Format>
bool load_stored(const Source<Format>& src, int token, Place at, float* x) {
  const auto load = [&](auto format, const uint8_t* codes, auto params) {
    const float scale = decltype(format)::affine(params).scale;
    if (scale != scale) return false;
    decode_row(format, codes, params, src.dim, src.mean_at(token), x);
    return true;
  };
  if (!src.young.has(token)) return load(Format{}, src.codes(at), src.params(at));
  const int row = src.young.row(token);
  return load(Int8{}, src.young.codes(true, row), young_params(src.young, true, row));
}

// The mean of the usable rows of tokens [begin, end), rotated; returns how many there were.
template <class Format>
int mean_of_rows(const Source<Format>& src, int64_t begin, int64_t end, float* mean) {
  alignas(64) float incoming[kMaxDim] = {}, stored[kMaxDim] = {}, x[kMaxDim];
  int count = 0;
  end = least<int64_t>(end, int64_t(src.length) + src.call.count);
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
      if (!load_stored(src, int(token), at, x)) continue;
      add_to(stored, x, src.dim);
    }
    ++count;
  }
  if (count == 0) return 0;
  rotate(incoming, src.dim, src.view.rotation);  // of a sum: once, not once a row
  const Vec rows = Vec::set(float(count));
  for (int c = 0; c < src.dim; c += kWidth) {
    ((Vec::load(incoming + c) + Vec::load(stored + c)) / rows).store(mean + c);
  }
  return count;
}

// Leaves the mean of the group of tokens [start, end) in mean[dim], as stored. A mean that has no
// place counts as zero, as it does for those who read. `taken`: it has been stored before.
template <class Format>
void group_mean(const Source<Format>& src, int64_t start, int64_t end, float* mean,
                bool taken = false) {
  uint16_t* slot = src.mean_at(start);
  if (slot && start >= src.length && !taken) {
    const bool found =
        start > 0 && mean_of_rows(src, start - src.p.cache.mean_group, start, mean) > 0;
    const bool own = !found && mean_of_rows(src, start, end, mean) >= kMinMeanRows;
    for (int c = 0; c < src.dim; c += kWidth) {
      const Vec x = found || own ? Vec::load(mean + c) : zero();
      clamp(x, -kMaxAbs, kMaxAbs).store_half(slot + c);
    }
  }
  for (int c = 0; c < src.dim; c += kWidth) {
    (slot ? Vec::load_half(slot + c) : zero()).store(mean + c);
  }
}

// What makes codes of a row's channels, of which it knows the range.
template <class Format>
struct RowEncoder {
  typename Format::Params params;
  float offset, inverse;

  RowEncoder(float low, float high, bool finite) : params(Format::params(low, high, finite)) {
    const RowAffine affine = Format::affine(params);
    offset = affine.offset, inverse = 1.f / affine.scale;
  }
  KVQUANT_INLINE Vec code(Vec x) const {  // not rounded; a NaN becomes 0
    return clamp((x - Vec::set(offset)) * Vec::set(inverse), 0.f, Format::kMaxCode);
  }
  KVQUANT_INLINE float rounded(float x) const {  // half to even
    return least(most((x - offset) * inverse, 0.f), Format::kMaxCode) + 12582912.f - 12582912.f;
  }
};

// A row in the basis it is stored in, ready for any format.
struct ReadyRow {
  const float* x;
  int dim;
  float low, high;
  bool finite;

  template <class Format>
  KVQUANT_INLINE void store(Format, uint8_t* codes, typename Format::Params& params) const {
    const RowEncoder<Format> own(low, high, finite);
    for (int c = 0; c < dim; c += kWidth) {
      Codes<Format>::store(codes, c, own.code(Vec::load(x + c)));
    }
    params = own.params;
  }
  // In 8 bits, and what a format makes of that row: where params are alike, and it needs no larger
  // codes than the format's, the same. As a code grows with its channel, those of the smallest and
  // the largest channel are the row's range.
  template <class Format>
  KVQUANT_INLINE void store_both(uint8_t* young, Int8::Params& young_params, Format, uint8_t* codes,
                                 typename Format::Params& params) const {
    const RowEncoder<Int8> eight(low, high, finite);
    young_params = eight.params;
    const float last = eight.rounded(high);  // the largest code
    if constexpr (std::is_same_v<typename Format::Params, Int8::Params>) {
      if (!finite || last <= Format::kMaxCode) {
        for (int c = 0; c < dim; c += kWidth) {
          const Vec code = eight.code(Vec::load(x + c));
          Codes<Int8>::store(young, c, code);
          Codes<Format>::store(codes, c, code);
        }
        params = eight.params;
        return;
      }
    }
    const RowAffine of = Int8::affine(eight.params);
    const RowEncoder<Format> own(of.scale * eight.rounded(low) + of.offset,
                                 of.scale * last + of.offset, finite);
    for (int c = 0; c < dim; c += kWidth) {
      const Vec code = round(eight.code(Vec::load(x + c)));
      Codes<Int8>::store(young, c, code);
      Codes<Format>::store(codes, c, own.code(fma(Vec::set(of.scale), code, Vec::set(of.offset))));
    }
    params = own.params;
  }
};

// Rotates x and takes the mean off.
template <class Format>
ReadyRow ready_row(const Source<Format>& src, const float* mean, float* x) {
  const bool finite = is_finite(x, src.dim);
  rotate(x, src.dim, src.view.rotation);
  Range range;
  for (int c = 0; c < src.dim; c += kWidth) {
    const Vec y = mean ? Vec::load(x + c) - Vec::load(mean + c) : Vec::load(x + c);
    y.store(x + c);
    range.add(y);
  }
  return {x, src.dim, reduce_min(range.low), reduce_max(range.high), finite};
}

// The group behind the open one, whose mean is of stored rows.
template <class Format>
int64_t next_group(const Source<Format>& src) {
  return src.young.group && src.length ? int64_t(src.young.from) + src.young.group : -1;
}

// Takes the mean of the group behind the open one, if that begins in the call, of what is stored:
// before new rows take the place of these.
template <class Format>
void take_next_mean(const Source<Format>& src) {
  const int64_t next = next_group(src), total = src.length + src.call.count;
  if (next < src.length || next >= total) return;
  alignas(64) float mean[kMaxDim];
  group_mean(src, next, least<int64_t>(next + src.young.group, total), mean);
}

// By age: whether some group behind an open one begins in the call.
bool opens_by_age(const AppendParams& p) {
  const int group = p.cache.mean_group;
  if (!p.seqs.young.data || !group) return false;
  for (int b = 0; b < p.seqs.batch; ++b) {
    const int length = checked_length(p.seqs.seq_lens[b]);
    if (length % group + call_rows(p.seqs, b).count > group || length % group == 0) return true;
  }
  return false;
}

// By age: where rows of one group go.
struct Fate {
  bool in_blocks, is_young;
  bool by_8_bits;  // first, so that cuts make no difference

  template <class Format>
  Fate(const Source<Format>& src, int start) {
    const int group = src.young.group, length = src.length + src.call.count;
    in_blocks = start >= group;
    is_young = group && (!in_blocks || start >= kept_from(group, length));
    by_8_bits = is_young || (group && src.length > 0 && start <= src.young.from);
  }
};

template <class Format>
void write_row(const Source<Format>& src, bool is_key, const Fate& fate, int token, Place to,
               const ReadyRow& row) {
  if (!fate.by_8_bits) return row.store(Format{}, src.codes(to), src.params(to));
  alignas(64) uint8_t codes[kMaxDim];
  Int8::Params params;
  const int at = fate.is_young ? src.young.row(token) : 0;
  uint8_t* const young = fate.is_young ? src.young.codes(is_key, at) : codes;
  Int8::Params& of_young = fate.is_young ? young_params(src.young, is_key, at) : params;
  if (!fate.in_blocks) return row.store(Int8{}, young, of_young);
  row.store_both(young, of_young, Format{}, src.codes(to), src.params(to));
}

}  // namespace

Status append(const AppendParams& p, int threads) {
  const CacheView& cache = p.cache;
  const int64_t tokens = p.seqs.max_seqlen_q, pairs = int64_t(cache.num_kv_heads) * 2;
  const int64_t chunks = chunks_of(cache, p.seqs.max_seqlen_q);
  const int64_t elements =
      p.seqs.batch * tokens * cache.num_kv_heads * (cache.k.head_dim + cache.v.head_dim);
  if (tokens == 0) return Status::ok();
  const Status status = with_pair(cache.k.format, cache.v.format, [&](auto formats) {
    if (opens_by_age(p)) {
      parallel(worth(threads, elements), p.seqs.batch * pairs / 2, [&](int64_t item) {
        const int heads = cache.num_kv_heads;
        with_rows(formats, true, [&](auto format) {
          take_next_mean(Source(format, p, int(item / heads), int(item % heads), true));
        });
      });
    }
    parallel(worth(threads, elements), p.seqs.batch * pairs * chunks, [&](int64_t item) {
      const int sequence = int(item / (pairs * chunks)), pair = int(item / chunks % pairs);
      const bool is_key = pair % 2 == 0;
      with_rows(formats, is_key, [&](auto format) {
        const Source src(format, p, sequence, pair / 2, is_key);
        const Chunk chunk = chunk_of(cache, src.length, src.call.count, int(item % chunks));
        if (chunk.begin >= chunk.end) return;
        alignas(64) float mean[kMaxDim], x[kMaxDim];
        const bool has_mean = is_key && cache.mean_group;
        if (has_mean) {
          group_mean(src, chunk.start, chunk.end, mean, chunk.start == next_group(src));
        }
        const Fate fate(src, chunk.start);
        for (int token = chunk.begin; token < chunk.end; ++token) {
          const Place to = src.place(token - src.length);
          if (to.block < 0) continue;
          src.load(token - src.length, x);
          write_row(src, is_key, fate, token, to, ready_row(src, has_mean ? mean : nullptr, x));
        }
      });
    });
    return Status::ok();
  });
  if (p.advance && status.code == Status::kOk) {
    for (int b = 0; b < p.seqs.batch; ++b) p.advance[b] += call_rows(p.seqs, b).count;
  }
  return status;
}

}  // namespace kvquant::cpu::KVQUANT_ISA
