// What a launcher or CPU kernel reports. No exceptions and no strings are built below the bindings.
#pragma once

namespace kvquant {

struct Status {
  enum Code { kOk, kUnsupported, kDeviceError };
  Code code = kOk;
  const char* what = nullptr;  // static string: the refused argument, or the device's error text

  static constexpr Status ok() { return {}; }
  static constexpr Status unsupported(const char* what) { return {kUnsupported, what}; }
  static constexpr Status device(const char* what) { return {kDeviceError, what}; }
};

}  // namespace kvquant
