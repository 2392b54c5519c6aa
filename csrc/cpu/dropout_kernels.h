// y = x where the element's 16 random bits are num_dropped or more, else 0.

#include "random_bits.h"

// Elements first .. first + count - 1 of a tensor.
template <class T>
void dropout(const T* x, int64_t first, uint64_t seed, uint32_t num_dropped, T* y, int64_t count) {
  const F32 zero = splat(0.0f);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    I32 keep = widen(random_bits(seed, first + i)) >= num_dropped;
    store(y + i, keep ? load(x + i) : zero);
  }
  if (i < count) {
    I32 keep = widen(random_bits(seed, first + i)) >= num_dropped;
    store(y + i, keep ? load(x + i, count - i) : zero, count - i);
  }
}
