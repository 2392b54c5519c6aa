// What attention's kernels are made of: products of small matrices in registers.

#define INLINE_MEMBER inline __attribute__((always_inline))
#define INLINE static INLINE_MEMBER

constexpr int TILE_ROWS = LANES == 16 ? 8 : 4, TILE_VECTORS = LANES == 4 ? 2 : 3;  // accumulators that fit in registers
constexpr int64_t KEYS = ATTENTION_KEYS;  // a multiple of TILE_ROWS; S^T of a panel stays in the first-level cache

// What tensors of T are multiplied as: fp32, or bf16 where the processor multiplies that twice as fast.
template <class T>
struct Operand { using Element = float; };
#if HAS_BF16
template <>
struct Operand<Bf16> { using Element = Bf16; };
#endif

// So many neighbours along the dimension that is summed over lie together, in the 32 bits of one lane.
template <class Element>
constexpr int64_t TERMS = sizeof(float) / sizeof(Element);

INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// How many of so many vectors the next tile takes: as many as it can, but no last tile of one vector if avoidable.
INLINE int64_t next_vectors(int64_t left) {
  return left > TILE_VECTORS + 1 ? TILE_VECTORS : left == TILE_VECTORS + 1 ? (left + 1) / 2 : left;
}

// ---- products ----

INLINE F32 load_terms(const float* from) { return load(from); }
INLINE U32 load_terms(const Bf16* from) { return load_bits(from); }
INLINE F32 splat_terms(const float* from) { return splat(*from); }
INLINE U32 splat_terms(const Bf16* from) {
  uint32_t pair;
  __builtin_memcpy(&pair, from, sizeof pair);
  return U32{} + pair;
}
INLINE F32 add_product(F32 sum, F32 a, F32 b) { return sum + a * b; }
INLINE F32 add_product(F32 sum, U32 a, U32 b) { return add_dot_of_bf16_pairs(sum, a, b); }

INLINE void store_terms(float* to, const F32 (&terms)[1]) { store(to, terms[0]); }
INLINE void store_terms(Bf16* to, const F32 (&terms)[2]) {
  U32 pairs = bf16_pairs(terms[0], terms[1]);
  __builtin_memcpy(to, &pairs, sizeof pairs);
}

// TILE_ROWS rows of V vectors, in registers.
template <int V>
struct Tile {
  F32 at[TILE_ROWS][V];

  INLINE_MEMBER void load_rows(const float* from, int64_t stride) {
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) at[r][v] = load(from + r * stride + v * LANES);
    }
  }

  INLINE_MEMBER void store_rows(float* to, int64_t stride) const {
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(to + r * stride + v * LANES, at[r][v]);
    }
  }

  // at[r][:] += sum over s of a[r, s] * b[s][:], where a[r, s] begins at a[r * a_row + s * a_step]: TERMS elements.
  template <class Element>
  INLINE_MEMBER void add_product_of(const Element* a, int64_t a_row, int64_t a_step, const Element* b, int64_t b_step,
                                    int64_t steps) {
    for (int64_t s = 0; s < steps; ++s) {
      decltype(load_terms(b)) right[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) right[v] = load_terms(b + v * LANES * TERMS<Element>);
#pragma GCC unroll 8
      for (int r = 0; r < TILE_ROWS; ++r) {
        auto left = splat_terms(a + r * a_row);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) at[r][v] = add_product(at[r][v], left, right[v]);
      }
      a += a_step;
      b += b_step;
    }
  }
};
