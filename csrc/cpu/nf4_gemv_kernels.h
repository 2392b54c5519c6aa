// y = x W^T for few tokens: the weights are looked up in registers, multiplied and forgotten; sums are fp32.
//
// LANES * 8 codes, a chunk, are loaded as they lie, 8 in every 32 bits, and shifted so that each in turn is an index.
// No code moves to another lane: x is put into the order in which they come instead, once for all rows. A chunk's sum
// is multiplied by the scales of its blocks at the end, so one table, the codebook, serves all blocks.

// Nibble k of 32 bits is element k ^ 1 of 8: the even element of a byte is in the high nibble.
template <class T>
struct Nf4Chunk {  // fp32 and fp16: one element of x for each lane and nibble, in fp32
  static constexpr int VECTORS = 8;

  static __attribute__((always_inline)) Table codebook() { return load_table(nf4::CODEBOOK); }
  static uint32_t x_of(const T* x, int k) { return __builtin_bit_cast(uint32_t, load(x + (k ^ 1), 1)[0]); }

  static __attribute__((always_inline)) F32 multiply_add(F32 sum, const Table& codebook, U32 codes, U32 x) {
    return sum + lookup(codebook, codes) * bit_cast<F32>(x);
  }
};

template <>
struct Nf4Chunk<Bf16> {  // two for each: the codebook is rounded to bf16, so each half of 32 bits looks up one weight
  static constexpr int VECTORS = 4;

  static __attribute__((always_inline)) HalfTable codebook() {
    return half_table(load_table(nf4::CODEBOOK), (Bf16*)nullptr);
  }
  static uint32_t x_of(const Bf16* x, int k) { return x[k ^ 1].bits | uint32_t(x[(k ^ 1) + 4].bits) << 16; }

  static __attribute__((always_inline)) F32 multiply_add(F32 sum, const HalfTable& codebook, U32 codes, U32 x) {
    return add_dot_of_bf16_pairs(sum, lookup(codebook, codes), x);
  }
};

// Token number `token` of `tokens` in the order of the chunks, filled up with zeros to complete ones. Chunks of all
// tokens lie together: (chunks, tokens, VECTORS, LANES).
template <class T>
void nf4_gemv_order(const T* x, int64_t width, int64_t token, int64_t tokens, uint32_t* ordered) {
  constexpr int64_t CHUNK = 8 * LANES, VECTORS = Nf4Chunk<T>::VECTORS;
  for (int64_t i = 0; i < width; i += CHUNK) {
    T padded[CHUNK] = {};
    __builtin_memcpy(padded, x + i, (width - i < CHUNK ? width - i : CHUNK) * sizeof(T));
    uint32_t* to = ordered + (i / CHUNK * tokens + token) * VECTORS * LANES;
    for (int k = 0; k < VECTORS; ++k) {
      for (int lane = 0; lane < LANES; ++lane) *to++ = Nf4Chunk<T>::x_of(padded + 8 * lane, k);
    }
  }
}

// Adds one chunk of a row to the sums of TOKENS tokens. `scales` are those of the chunk's blocks and what follows.
template <int TOKENS, class T, class Codebook>
static inline __attribute__((always_inline)) void nf4_gemv_chunk(U32 codes, const Codebook& codebook,
                                                                 const float* scales, U32 block_of_lane,
                                                                 const uint32_t* x, F32* sums) {
  constexpr int VECTORS = Nf4Chunk<T>::VECTORS;
  F32 scale = lookup(load_table(scales), block_of_lane);
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; ++t) {
    F32 sum = {};
#pragma GCC unroll 8
    for (int k = 0; k < VECTORS; ++k) {
      sum = Nf4Chunk<T>::multiply_add(sum, codebook, codes >> 4 * k, load_bits(x + (t * VECTORS + k) * LANES));
    }
    sums[t] += sum * scale;
  }
}

// Rows [begin, end) of W (of `width` elements, whole blocks) for TOKENS tokens, ordered as above, y_stride apart in y.
template <int TOKENS, class T>
void nf4_gemv(const uint32_t* x, int64_t width, const uint8_t* codes, nf4::Scales scales, int64_t block_size, T* y,
              int64_t y_stride, int64_t begin, int64_t end) {
  constexpr int64_t CHUNK = 8 * LANES, X_CHUNK = TOKENS * Nf4Chunk<T>::VECTORS * LANES;
  // A stretch of x, for all tokens, stays in the L1 cache for as many rows: up to 16 KB in bf16, 32 KB in fp32.
  constexpr int64_t STRETCH = TOKENS <= 2 ? 4096 : 8192 / TOKENS, ROWS = 16;
  auto codebook = Nf4Chunk<T>::codebook();
  int block_size_log2 = __builtin_ctzll(block_size);
  U32 block_of_lane;
  for (int lane = 0; lane < LANES; ++lane) block_of_lane[lane] = 8 * lane >> block_size_log2;

  for (int64_t first_row = begin; first_row < end; first_row += ROWS) {
    int64_t rows = end - first_row < ROWS ? end - first_row : ROWS;
    F32 sums[ROWS][TOKENS] = {};
    for (int64_t start = 0; start < width; start += STRETCH) {
      int64_t count = width - start < STRETCH ? width - start : STRETCH;
      int64_t first_block = start >> block_size_log2;
      int64_t num_blocks = ((start + count - 1) >> block_size_log2) - first_block + 1;
      for (int64_t row = 0; row < rows; ++row) {
        float block_scales[STRETCH / nf4::SMALLEST_BLOCK_SIZE + 16];
        scales.copy(((first_row + row) * width >> block_size_log2) + first_block, num_blocks, block_scales);
        __builtin_memset(block_scales + num_blocks, 0, 16 * sizeof(float));

        F32 row_sums[TOKENS];
        __builtin_memcpy(row_sums, sums[row], sizeof row_sums);
        const uint8_t* from = codes + ((first_row + row) * width + start) / 2;
        const uint32_t* x_from = x + start / CHUNK * X_CHUNK;
        int64_t i = 0;
        for (; i + CHUNK <= count; i += CHUNK, from += CHUNK / 2, x_from += X_CHUNK) {
          const float* chunk_scales = block_scales + ((start + i) >> block_size_log2) - first_block;
          nf4_gemv_chunk<TOKENS, T>(load_bits(from), codebook, chunk_scales, block_of_lane, x_from, row_sums);
        }
        if (i < count) {  // x is zero beyond the end, whatever code 0 stands for
          U32 packed = {};
          __builtin_memcpy(&packed, from, (count - i) / 2);
          const float* chunk_scales = block_scales + ((start + i) >> block_size_log2) - first_block;
          nf4_gemv_chunk<TOKENS, T>(packed, codebook, chunk_scales, block_of_lane, x_from, row_sums);
        }
        __builtin_memcpy(sums[row], row_sums, sizeof row_sums);
      }
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int t = 0; t < TOKENS; ++t) store(y + t * y_stride + first_row + row, splat(sum(sums[row][t])), 1);
    }
  }
}
