// Rotates the pairs (i, i + R) of every head by the token's angle i. sign is +1, or -1 for the inverse rotation.

template <class T>
void rope(Rows<const T> x, const float* cos, const float* sin, float sign, Rows<T> y, int64_t num_heads,
          int64_t begin_token, int64_t end_token) {
  int64_t half = x.width / 2;
  for (int64_t token = begin_token; token < end_token; ++token) {
    const float *cos_row = cos + token * half, *sin_row = sin + token * half;
    for (int64_t head = 0; head < num_heads; ++head) {
      const T* first = x[token * num_heads + head];
      T* out = y[token * num_heads + head];
      int64_t i = 0;
      for (; i + LANES <= half; i += LANES) {
        F32 a = load(first + i), b = load(first + half + i), c = load(cos_row + i), s = load(sin_row + i) * sign;
        store(out + i, a * c - b * s);
        store(out + half + i, b * c + a * s);
      }
      if (int64_t left = half - i; left > 0) {
        F32 a = load(first + i, left), b = load(first + half + i, left);
        F32 c = load(cos_row + i, left), s = load(sin_row + i, left) * sign;
        store(out + i, a * c - b * s, left);
        store(out + half + i, b * c + a * s, left);
      }
    }
  }
}
