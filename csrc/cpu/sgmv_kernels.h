// y += (x Aᵀ) B for the tokens of one segment, with the rows of A and B that are its own. Two passes over a few tokens
// at a time: `shrink` makes h, a dot product for each token and rank, in fp32; `expand` adds h's multiples of B's rows.

constexpr int SGMV_RANKS = 4;  // dot products at a time, for each of the tokens

// h[t][r] for TOKENS tokens and RANKS rows of A.
template <int TOKENS, int RANKS, class T>
void sgmv_dots(Rows<const T> x, int64_t token, const T* A, int64_t width, float* h, int64_t h_stride) {
  F32 sums[TOKENS][RANKS] = {};
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    F32 a[RANKS];
    for (int r = 0; r < RANKS; ++r) a[r] = load(A + r * width + i);
    for (int t = 0; t < TOKENS; ++t) {
      F32 v = load(x[token + t] + i);
      for (int r = 0; r < RANKS; ++r) sums[t][r] += v * a[r];
    }
  }
  if (int64_t left = width - i; left > 0) {
    for (int t = 0; t < TOKENS; ++t) {
      F32 v = load(x[token + t] + i, left);
      for (int r = 0; r < RANKS; ++r) sums[t][r] += v * load(A + r * width + i, left);
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    for (int r = 0; r < RANKS; ++r) h[t * h_stride + r] = sum(sums[t][r]);
  }
}

// The same; products of pairs of bf16 are one instruction where the processor has it.
template <int TOKENS, int RANKS>
void sgmv_dots(Rows<const Bf16> x, int64_t token, const Bf16* A, int64_t width, float* h, int64_t h_stride) {
  F32 sums[TOKENS][RANKS] = {};
  int64_t i = 0;
  for (; i + 2 * LANES <= width; i += 2 * LANES) {
    U32 a[RANKS];
    for (int r = 0; r < RANKS; ++r) a[r] = load_bits(A + r * width + i);
    for (int t = 0; t < TOKENS; ++t) {
      U32 v = load_bits(x[token + t] + i);
      for (int r = 0; r < RANKS; ++r) sums[t][r] = add_dot_of_bf16_pairs(sums[t][r], v, a[r]);
    }
  }
  for (; i < width; i += LANES) {
    int64_t left = width - i < LANES ? width - i : LANES;
    for (int t = 0; t < TOKENS; ++t) {
      F32 v = load(x[token + t] + i, left);
      for (int r = 0; r < RANKS; ++r) sums[t][r] += v * load(A + r * width + i, left);
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    for (int r = 0; r < RANKS; ++r) h[t * h_stride + r] = sum(sums[t][r]);
  }
}

template <int TOKENS, class T>
void sgmv_tokens(Rows<const T> x, const T* A, const T* B, Rows<T> y, int64_t token, int64_t rank, float* h) {
  int64_t in = x.width, out = y.width, r = 0;
  for (; r + SGMV_RANKS <= rank; r += SGMV_RANKS) {
    sgmv_dots<TOKENS, SGMV_RANKS>(x, token, A + r * in, in, h + r, rank);
  }
  for (; r < rank; ++r) sgmv_dots<TOKENS, 1>(x, token, A + r * in, in, h + r, rank);

  int64_t o = 0;
  for (; o + 2 * LANES <= out; o += 2 * LANES) {
    F32 sums[TOKENS][2];
    for (int t = 0; t < TOKENS; ++t) {
      for (int c = 0; c < 2; ++c) sums[t][c] = load(y[token + t] + o + c * LANES);
    }
    for (int64_t k = 0; k < rank; ++k) {
      F32 b[2] = {load(B + k * out + o), load(B + k * out + o + LANES)};
      for (int t = 0; t < TOKENS; ++t) {
        for (int c = 0; c < 2; ++c) sums[t][c] += b[c] * h[t * rank + k];
      }
    }
    for (int t = 0; t < TOKENS; ++t) {
      for (int c = 0; c < 2; ++c) store(y[token + t] + o + c * LANES, sums[t][c]);
    }
  }
  for (; o < out; o += LANES) {
    int64_t left = out - o < LANES ? out - o : LANES;
    for (int t = 0; t < TOKENS; ++t) {
      F32 total = load(y[token + t] + o, left);
      for (int64_t k = 0; k < rank; ++k) total += load(B + k * out + o, left) * h[t * rank + k];
      store(y[token + t] + o, total, left);
    }
  }
}

// Tokens [begin, end), all of one segment. A (rank, in), B (rank, out); h: scratch for SGMV_TOKENS * rank numbers.
template <class T>
void sgmv(Rows<const T> x, const T* A, const T* B, Rows<T> y, int64_t begin, int64_t end, int64_t rank, float* h) {
  int64_t token = begin;
  for (; token + SGMV_TOKENS <= end; token += SGMV_TOKENS) {
    sgmv_tokens<SGMV_TOKENS>(x, A, B, y, token, rank, h);
  }
  for (; token < end; ++token) sgmv_tokens<1>(x, A, B, y, token, rank, h);
}
