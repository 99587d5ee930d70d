// Which of the stored tokens [start, length) a query sees that stands at `position`.
#pragma once

#include "common/host_device.h"

namespace kvquant {

// sliding_window 0: all of them.
KVQUANT_HD int first_seen(int sliding_window, int start, int position) {
  return sliding_window ? most(start, most(position, 0) - sliding_window + 1) : start;
}
KVQUANT_HD int seen_end(bool causal, int length, int position) {
  return causal ? most(0, least(length, position + 1)) : length;
}

}  // namespace kvquant
