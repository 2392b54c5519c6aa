// Loops over rows on torch's own thread pool. Compiled for the baseline processor.

#pragma once

#include "../tensors.h"

namespace minift {

// Enough elements for one thread to be worth waking: about 10 microseconds of work.
constexpr int64_t GRAIN_ELEMENTS = 32768;

// function(begin, end) over [0, count) in parallel; each item is `width` elements of work.
template <class Function>
void parallel_rows(int64_t count, int64_t width, const Function& function) {
  if (count == 0 || width == 0) return;
  int64_t grain = GRAIN_ELEMENTS / width + 1;
  torch::stable::parallel_for(0, count, grain, function);
}

}  // namespace minift
