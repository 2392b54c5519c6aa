// Products of wide bf16 matrices with narrow ones, sums in fp32. All of them are rows times a panel:
//
//     sums[m][n] += sum over k of rows[m][k] panel[k][n]
//
// Lanes run along n. A panel has two neighbours along k in each of its 32-bit elements, (2 k, n) and (2 k + 1, n): one
// instruction multiplies both by a pair of a row, which is broadcast, and adds both products up.

#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t two_of(Bf16 first, Bf16 second) { return first.bits | uint32_t(second.bits) << 16; }

// Element (k, n) of a matrix of `length` times `width` is from[k * k_stride + n * n_stride]. An odd length is completed
// by zeros; columns of the panel beyond `width` stay as they are.
INLINE void pack_panel(const Bf16* from, int64_t k_stride, int64_t n_stride, int64_t length, int64_t width,
                       uint32_t* panel, int64_t panel_width) {
  for (int64_t k = 0; k < length; k += 2, panel += panel_width) {
    const Bf16 *first = from + k * k_stride, *second = first + k_stride;
    if (k + 1 == length) {
      for (int64_t n = 0; n < width; ++n) panel[n] = two_of(first[n * n_stride], Bf16{0});
    } else if (n_stride == 1) {
      for (int64_t n = 0; n < width; ++n) panel[n] = two_of(first[n], second[n]);
    } else if (k_stride == 1) {
      for (int64_t n = 0; n < width; ++n) __builtin_memcpy(panel + n, first + n * n_stride, sizeof *panel);
    } else {
      for (int64_t n = 0; n < width; ++n) panel[n] = two_of(first[n * n_stride], second[n * n_stride]);
    }
  }
}

void pack_low_rank(const Bf16* from, int64_t k_stride, int64_t n_stride, int64_t length, int64_t width,
                   uint32_t* panel, int64_t panel_width) {
  pack_panel(from, k_stride, n_stride, length, width, panel, panel_width);
}

// M rows times V vectors of columns. Pair p of row m is at rows + m * row_bytes + p * pair_bytes.
template <int M, int V>
INLINE void add_products(F32 (&sums)[M][V], const char* rows, int64_t row_bytes, int64_t pair_bytes,
                         const uint32_t* panel, int64_t panel_width, int64_t num_pairs) {
  for (int64_t p = 0; p < num_pairs; ++p, rows += pair_bytes, panel += panel_width) {
    U32 columns[V];
    for (int v = 0; v < V; ++v) columns[v] = load_bits(panel + v * LANES);
    for (int m = 0; m < M; ++m) {
      uint32_t pair;
      __builtin_memcpy(&pair, rows + m * row_bytes, sizeof pair);
      for (int v = 0; v < V; ++v) sums[m][v] = add_dot_of_bf16_pairs(sums[m][v], U32{} + pair, columns[v]);
    }
  }
}

// ---- a wide matrix and a factor to a narrow one, or narrow ones and factors to a wide one ----

template <int M, int V>
INLINE void multiply_block(const LowRankSum& sum, int64_t row, int64_t column) {
  int64_t left = sum.width - column;
  F32 sums[M][V] = {}, biases[V] = {};
  for (int v = 0; sum.bias != nullptr && v < V; ++v) {
    const Bf16* at = sum.bias + column + v * LANES;
    biases[v] = left >= V * LANES ? load(at) : load(at, left - v * LANES);
  }
  for (int64_t i = 0; i < sum.num_products; ++i) {
    const LowRankProduct& product = sum.products[i];
    const Bf16* rows = product.rows + row * product.stride;
    const uint32_t* panel = product.panel + column;
    int64_t num_pairs = product.length / 2;
    add_products<M, V>(sums, (const char*)rows, product.stride * sizeof(Bf16), 4, panel, sum.panel_width, num_pairs);
    if (product.length % 2 == 1) {
      for (int m = 0; m < M; ++m) {
        U32 last = U32{} + two_of(rows[m * product.stride + product.length - 1], Bf16{0});
        for (int v = 0; v < V; ++v) {
          U32 columns = load_bits(panel + num_pairs * sum.panel_width + v * LANES);
          sums[m][v] = add_dot_of_bf16_pairs(sums[m][v], last, columns);
        }
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) {
      Bf16* at = sum.out + (row + m) * sum.out_stride + column + v * LANES;
      F32 value = biases[v] + sums[m][v] * sum.scale;
      if (left >= V * LANES) store(at, value);
      else store(at, value, left - v * LANES);
    }
  }
}

template <int M>
INLINE void multiply_row_block(const LowRankSum& sum, int64_t row) {
  int64_t column = 0;
  for (; column + 2 * LANES <= sum.width; column += 2 * LANES) multiply_block<M, 2>(sum, row, column);
  for (; column < sum.width; column += LANES) multiply_block<M, 1>(sum, row, column);
}

// Rows [begin, end).
void low_rank_multiply(const LowRankSum& sum, int64_t begin, int64_t end) {
  constexpr int ROWS = LANES == 16 ? LOW_RANK_ROWS : LOW_RANK_ROWS / 2;  // twice as many sums are in registers
  int64_t row = begin;
  for (; row + ROWS <= end; row += ROWS) multiply_row_block<ROWS>(sum, row);
  for (; row < end; ++row) multiply_row_block<1>(sum, row);
}

// ---- the gradient of factors: wide^T narrow, summed over tokens ----

// sums[r * GRADIENT_STRIP + w] for `width` <= GRADIENT_STRIP columns w of the wide matrix. `narrow` is a panel: k are
// the tokens, n the ranks r, padded.
void low_rank_gradient(const Bf16* wide, int64_t stride, int64_t tokens, int64_t width, const uint32_t* narrow,
                       int64_t narrow_width, int64_t rank, float* sums) {
  constexpr int ROWS = LANES == 16 ? LOW_RANK_ROWS : LOW_RANK_ROWS / 2;
  uint32_t panel[GRADIENT_TOKENS / 2 * GRADIENT_STRIP] = {};
  __builtin_memset(sums, 0, (rank + ROWS - 1) / ROWS * ROWS * GRADIENT_STRIP * sizeof *sums);
  for (int64_t token = 0; token < tokens; token += GRADIENT_TOKENS) {
    int64_t count = tokens - token < GRADIENT_TOKENS ? tokens - token : GRADIENT_TOKENS;
    pack_panel(wide + token * stride, stride, 1, count, width, panel, GRADIENT_STRIP);
    for (int64_t r = 0; r < rank; r += ROWS) {
      const char* rows = (const char*)(narrow + token / 2 * narrow_width + r);
      for (int64_t w = 0; w < width; w += 2 * LANES) {
        F32 block[ROWS][2];
        float* at = sums + r * GRADIENT_STRIP + w;
        for (int m = 0; m < ROWS; ++m) {
          for (int v = 0; v < 2; ++v) block[m][v] = load(at + m * GRADIENT_STRIP + v * LANES);
        }
        add_products<ROWS, 2>(block, rows, 4, narrow_width * 4, panel + w, GRADIENT_STRIP, (count + 1) / 2);
        for (int m = 0; m < ROWS; ++m) {
          for (int v = 0; v < 2; ++v) store(at + m * GRADIENT_STRIP + v * LANES, block[m][v]);
        }
      }
    }
  }
}

// Rows of `rank` sums to out[w * w_stride + r * r_stride]; one of the strides is 1.
template <class T>
void store_low_rank_gradient(const float* sums, int64_t rank, int64_t width, T* out, int64_t w_stride,
                             int64_t r_stride) {
  if (w_stride == 1) {
    for (int64_t r = 0; r < rank; ++r) {
      for (int64_t w = 0; w < width; w += LANES) {
        F32 value = load(sums + r * GRADIENT_STRIP + w);
        if (width - w >= LANES) store(out + r * r_stride + w, value);
        else store(out + r * r_stride + w, value, width - w);
      }
    }
    return;
  }
  for (int64_t w = 0; w < width; ++w) {
    for (int64_t r = 0; r < rank; r += LANES) {
      int64_t count = rank - r < LANES ? rank - r : LANES;
      float lanes[LANES] = {};
      for (int64_t i = 0; i < count; ++i) lanes[i] = sums[(r + i) * GRADIENT_STRIP + w];
      store(out + w * w_stride + r, load(lanes), count);
    }
  }
}
