// Formats by age: which tokens are young, and where their rows are. See docs/by-age.md.
//
// A sequence's first group of tokens and those from its open group on are young: 8-bit rows in the
// sequence's own slab, Sequences::young. The others are read from the blocks of the view.
#pragma once

#include "common/groups.h"
#include "common/paging.h"
#include "params.h"

namespace kvquant {

constexpr int kSpareTokens = 32;  // a call of as many may write while others read what was open

// The group size of a call by age; 0: not by age.
KVQUANT_HD int age_group(const CacheView& cache, const Sequences& seqs) {
  return seqs.young.data ? chunk_tokens(cache) : 0;
}
// The first token of the group of a sequence's last one.
KVQUANT_HD int open_start(int group, int length) {
  return length > 0 ? (length - 1) / group * group : 0;
}

// Rows of a slab, and that of a token: the first group, behind it the ring.
KVQUANT_HD int young_rows(int group) { return 2 * group + kSpareTokens; }
KVQUANT_HD int young_row(int group, int token) {
  return token < group ? token : group + token % (group + kSpareTokens);
}

// One head's young rows of a sequence, and which tokens have one.
struct Young {
  int group = 0;  // 0: none has
  int from = 0;   // the first token, but for the first group
  uint8_t* data = nullptr;
  int k_dim, v_dim;

  Young() = default;
  KVQUANT_HD Young(const CacheView& cache, const Sequences& seqs, int sequence, int head, int from)
      : group(age_group(cache, seqs)),
        from(from),
        data(group ? rows_of<uint8_t>(seqs.young, sequence, head) : nullptr),
        k_dim(cache.k.head_dim),
        v_dim(cache.v.head_dim) {}

  KVQUANT_HD int rows() const { return young_rows(group); }
  KVQUANT_HD bool has(int token) const { return group && (token < group || token >= from); }
  KVQUANT_HD int row(int token) const { return young_row(group, token); }
  // Tokens from this one on that lie behind it row by row: to the end of the group or of the ring.
  KVQUANT_HD int run(int token) const { return least(group - token % group, rows() - row(token)); }
  KVQUANT_HD uint8_t* codes(bool is_key, int row) const {
    return data + (is_key ? int64_t(row) * k_dim : int64_t(rows()) * k_dim + int64_t(row) * v_dim);
  }
  KVQUANT_HD uint8_t* params(bool is_key, int row) const {  // four bytes a row
    uint8_t* const first = data + int64_t(rows()) * (k_dim + v_dim);
    return first + int64_t(4) * (is_key ? row : rows() + row);
  }
};

// A call's young rows as a view: block and row of a token are its sequence and young_row. All else,
// means too, is the old rows'.
KVQUANT_HD CacheView young_view(const CacheView& cache, const Sequences& seqs) {
  const int64_t rows = young_rows(chunk_tokens(cache));
  CacheView view = cache;
  view.k.format = view.v.format = RowFormat::kInt8;
  view.k.codes = view.v.codes = view.k.params = view.v.params = seqs.young;
  view.v.codes.data += rows * cache.k.head_dim;
  view.k.params.data += rows * (cache.k.head_dim + cache.v.head_dim);
  view.v.params.data = view.k.params.data + 4 * rows;
  return view;
}

// Where attention of the last `count` of `length` tokens begins to read young rows.
KVQUANT_HD int read_from(int group, int length, int count) {
  return group ? open_start(group, count <= kSpareTokens ? most(0, length - count) : length) : 0;
}
// From which token on the ring holds rows, with `length` tokens stored.
KVQUANT_HD int kept_from(int group, int length) {
  return open_start(group, most(0, length - kSpareTokens));
}

}  // namespace kvquant
