// The row formats, and the one place where a format that is known at run time becomes a type.
#pragma once

#include <string_view>
#include <type_traits>

#include "formats/int4.h"
#include "formats/int8.h"
#include "status.h"

namespace kvquant {

// Their tags count from 0.
template <class... Format>
struct FormatList {
  static constexpr int kCount = sizeof...(Format);
};
using RowFormats = FormatList<Int8, Int4>;

// Calls f with the format of this tag; false if there is none.
template <class F, class... Format>
constexpr KVQUANT_INLINE bool with_format(RowFormat tag, FormatList<Format...>, F&& f) {
  return ((Format::kTag == tag && (f(Format{}), true)) || ...);
}

inline const char* name_of(RowFormat tag) {
  const char* name = "an unknown format";
  with_format(tag, RowFormats{}, [&](auto format) { name = format.kName; });
  return name;
}
// Bytes of a row's codes.
inline int code_bytes(RowFormat tag, int head_dim) {
  int bytes = 0;
  with_format(tag, RowFormats{}, [&](auto format) { bytes = format.code_bytes(head_dim); });
  return bytes;
}
// Bits of a channel's codes, of key and value together.
inline int code_bits(RowFormat key, RowFormat value) {
  return code_bytes(key, 8) + code_bytes(value, 8);
}
// The format of this name; false if there is none.
template <class... Format>
bool find_format(FormatList<Format...>, std::string_view name, RowFormat& tag) {
  return ((Format::kName == name && (tag = Format::kTag, true)) || ...);
}

// The formats of keys and of values.
template <class K, class V>
struct FormatPair {
  using Key = K;
  using Value = V;
  static constexpr bool kByAge = false;
};

// A pair whose rows are by age (common/age.h): those of young tokens are in 8 bits.
template <class Pair>
struct AgedPair : Pair {
  static constexpr bool kByAge = true;
};
// Whether a pair's may be: pairs.def says so.
template <class Pair>
constexpr bool can_age(Pair) {
#define KVQUANT_PAIR(Key, Value)
#define KVQUANT_PAIR_BY_AGE(Key, Value) \
  if (std::is_same_v<Pair, FormatPair<Key, Value>>) return true;
#include "formats/pairs.def"
#undef KVQUANT_PAIR_BY_AGE
#undef KVQUANT_PAIR
  return false;
}

// Calls f with the pair of these tags, and returns its Status; refuses what pairs.def does not
// list.
template <class F>
constexpr KVQUANT_INLINE Status with_pair(RowFormat key, RowFormat value, F&& f) {
#define KVQUANT_PAIR(Key, Value) \
  if (key == Key::kTag && value == Value::kTag) return f(FormatPair<Key, Value>{});
#define KVQUANT_PAIR_BY_AGE KVQUANT_PAIR
#include "formats/pairs.def"
#undef KVQUANT_PAIR_BY_AGE
#undef KVQUANT_PAIR
  return Status::unsupported(
      "kernels for this pair of row formats are not built (formats/pairs.def)");
}

// Calls f with the format of keys or with that of values: compiled once where they are the same.
template <class Pair, class F>
constexpr KVQUANT_INLINE void with_rows(Pair, bool is_key, F&& f) {
  if constexpr (std::is_same_v<typename Pair::Key, typename Pair::Value>) {
    f(typename Pair::Key{});
  } else if (is_key) {
    f(typename Pair::Key{});
  } else {
    f(typename Pair::Value{});
  }
}

}  // namespace kvquant
