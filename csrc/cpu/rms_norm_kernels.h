// RMS normalisation of rows [begin, end). T is the type of x, weight, y and their gradients; rstd is fp32.

// Four sums in flight hide the latency of an addition, and 4 * LANES short sums lose less than one long one.
template <class Term>
static inline __attribute__((always_inline)) float sum_over(int64_t width, const Term& term) {
  F32 sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES) {
    for (int k = 0; k < 4; ++k) sums[k] += term(i + k * LANES);
  }
  for (; i + LANES <= width; i += LANES) sums[0] += term(i);
  if (i < width) sums[1] += term(i, width - i);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
struct Square {
  const T* x;
  __attribute__((always_inline)) F32 operator()(int64_t i) const {
    F32 v = load(x + i);
    return v * v;
  }
  __attribute__((always_inline)) F32 operator()(int64_t i, int64_t count) const {
    F32 v = load(x + i, count);
    return v * v;
  }
};

template <class T>
void rms_norm(Rows<const T> x, const T* weight, float eps, Rows<T> y, float* rstd, int64_t begin, int64_t end) {
  int64_t width = x.width;
  for (int64_t row = begin; row < end; ++row) {
    const T* x_row = x[row];
    T* y_row = y[row];
    float scale = 1.0f / __builtin_sqrtf(sum_over(width, Square<T>{x_row}) / float(width) + eps);
    rstd[row] = scale;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
      // Hugging Face rounds the normalised row to T before it multiplies by the weight.
      store(y_row + i, round_to<T>(load(x_row + i) * scale) * load(weight + i));
    }
    if (int64_t left = width - i; left > 0) {
      store(y_row + i, round_to<T>(load(x_row + i, left) * scale) * load(weight + i, left), left);
    }
  }
}

template <class T>
struct ScaledDot {
  const T *dy, *weight, *x;
  __attribute__((always_inline)) F32 operator()(int64_t i) const {
    return load(dy + i) * load(weight + i) * load(x + i);
  }
  __attribute__((always_inline)) F32 operator()(int64_t i, int64_t count) const {
    return load(dy + i, count) * load(weight + i, count) * load(x + i, count);
  }
};

// With n = x rstd and g = dy weight: dx = rstd (g - n mean(g n)), dweight = sum over rows of dy n. dx is rounded, then
// dresidual is added, if its data is not null. dweight (fp32, width) receives the sum over these rows; null if not
// wanted.
template <class T, bool NEED_DWEIGHT>
void rms_norm_backward(Rows<const T> dy, Rows<const T> x, const T* weight, const float* rstd, Rows<const T> dresidual,
                       Rows<T> dx, float* dweight, int64_t begin, int64_t end) {
  int64_t width = x.width;
  bool adds = dresidual.data != nullptr;
  if (NEED_DWEIGHT) __builtin_memset(dweight, 0, width * sizeof(float));
  for (int64_t row = begin; row < end; ++row) {
    const T *dy_row = dy[row], *x_row = x[row], *residual_row = adds ? dresidual[row] : nullptr;
    T* dx_row = dx[row];
    float scale = rstd[row];
    float projection = sum_over(width, ScaledDot<T>{dy_row, weight, x_row}) / float(width) * scale * scale * scale;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
      F32 d = load(dy_row + i), v = load(x_row + i);
      F32 g = d * load(weight + i) * scale - v * projection;
      store(dx_row + i, adds ? round_to<T>(g) + load(residual_row + i) : g);
      if (NEED_DWEIGHT) store(dweight + i, load(dweight + i) + d * (v * scale));
    }
    if (int64_t left = width - i; left > 0) {
      F32 d = load(dy_row + i, left), v = load(x_row + i, left);
      F32 g = d * load(weight + i, left) * scale - v * projection;
      store(dx_row + i, adds ? round_to<T>(g) + load(residual_row + i, left) : g, left);
      if (NEED_DWEIGHT) store(dweight + i, load(dweight + i, left) + d * (v * scale), left);
    }
  }
}
