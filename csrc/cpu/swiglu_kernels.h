// y = silu(gate) * up with silu(g) = g / (1 + e^-g), in fp32, rounded once at the end.

static inline __attribute__((always_inline)) F32 swiglu_value(F32 g, F32 up) { return g / (1.0f + exp(-g)) * up; }

template <class T>
void swiglu(const T* gate, const T* up, T* y, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(y + i, swiglu_value(load(gate + i), load(up + i)));
  if (int64_t left = count - i; left > 0) {
    store(y + i, swiglu_value(load(gate + i, left), load(up + i, left)), left);
  }
}

// With s = sigmoid(g): dup = dy g s, dgate = dy up s (1 + g (1 - s)).
// 1 - s is e^-g s, which does not cancel where s is near 1. Where e^-g is infinite s is 0, and so is dgate: the finite
// stand-in only keeps 0 * infinity away.
struct SwigluGradient { F32 gate, up; };

static inline __attribute__((always_inline)) SwigluGradient swiglu_gradient(F32 dy, F32 g, F32 up) {
  constexpr float LARGEST = 0x1.fffffep127f;
  F32 e = exp(-g);
  F32 s = 1.0f / (1.0f + e);
  F32 one_minus_s = (e > LARGEST ? splat(LARGEST) : e) * s;
  return {dy * up * (s * (1.0f + g * one_minus_s)), dy * (g * s)};
}

// y, what forward gave, is made again unless it is null.
template <class T>
void swiglu_backward(const T* dy, const T* gate, const T* up, T* dgate, T* dup, T* y, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    F32 g = load(gate + i), u = load(up + i);
    SwigluGradient gradient = swiglu_gradient(load(dy + i), g, u);
    store(dgate + i, gradient.gate);
    store(dup + i, gradient.up);
    if (y != nullptr) store(y + i, swiglu_value(g, u));
  }
  if (int64_t left = count - i; left > 0) {
    F32 g = load(gate + i, left), u = load(up + i, left);
    SwigluGradient gradient = swiglu_gradient(load(dy + i, left), g, u);
    store(dgate + i, gradient.gate, left);
    store(dup + i, gradient.up, left);
    if (y != nullptr) store(y + i, swiglu_value(g, u), left);
  }
}
