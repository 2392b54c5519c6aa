// Cross entropy of one row of logits, and its gradient softmax - one_hot, in fp32; every exponential is computed once.

// The sums of a lane are short, so that a wide row loses no more than a narrow one.
constexpr int64_t POWERS_BLOCK = 64 * LANES;

template <class T>
float largest_of(const T* logits, int64_t width) {
  F32 largest[4];
  for (F32& lanes : largest) lanes = splat(-__builtin_inff());
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES) {
    for (int k = 0; k < 4; ++k) largest[k] = at_least(load(logits + i + k * LANES), largest[k]);
  }
  for (; i < width; ++i) largest[0] = at_least(splat(load(logits + i, 1)[0]), largest[0]);
  F32 lanes = at_least(at_least(largest[0], largest[1]), at_least(largest[2], largest[3]));
  float found = lanes[0];
  for (int lane = 1; lane < LANES; ++lane) found = lanes[lane] > found ? lanes[lane] : found;
  return found;
}

// powers[i] = e^(logits[i] - largest), if they are to be kept; returns their sum.
template <class T, bool KEEP>
float sum_of_powers(const T* logits, float largest, float* powers, int64_t width) {
  float total = 0.0f;
  for (int64_t i = 0, end; i < width; i = end) {
    end = i + POWERS_BLOCK < width ? i + POWERS_BLOCK : width;
    F32 sums[2] = {};
    for (; i + 2 * LANES <= end; i += 2 * LANES) {
      for (int k = 0; k < 2; ++k) {
        F32 power = exp(load(logits + i + k * LANES) - largest);
        if (KEEP) store(powers + i + k * LANES, power);
        sums[k] += power;
      }
    }
    total += sum(sums[0] + sums[1]);
    for (; i < end; ++i) {
      float power = exp(load(logits + i, 1) - largest)[0];
      if (KEEP) powers[i] = power;
      total += power;
    }
  }
  return total;
}

// Returns the loss. With `powers` (fp32, of the row's width) the logits are overwritten by their gradient.
template <class T>
float cross_entropy(T* logits, int64_t width, int64_t target, float* powers) {
  float largest = largest_of(logits, width), of_target = load(logits + target, 1)[0];
  if (powers == nullptr) {
    return __builtin_logf(sum_of_powers<T, false>(logits, largest, powers, width)) + (largest - of_target);
  }
  float total = sum_of_powers<T, true>(logits, largest, powers, width), factor = 1.0f / total;
  powers[target] -= total;
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) store(logits + i, load(powers + i) * factor);
  if (int64_t left = width - i; left > 0) store(logits + i, load(powers + i, left) * factor, left);
  return __builtin_logf(total) + (largest - of_target);
}
