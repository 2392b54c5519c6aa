// What attention's kernels are made of: products of small matrices in registers, queries and keys in fp32 and in the
// layouts that attention_kernels.h explains, and which keys a vector of queries sees.

#define INLINE static inline __attribute__((always_inline))

constexpr int TILE_ROWS = LANES == 16 ? 8 : 4, TILE_VECTORS = LANES == 4 ? 2 : 3;  // accumulators that fit in registers
constexpr int64_t KEYS = ATTENTION_KEYS;  // a multiple of TILE_ROWS; S^T of a panel stays in the first-level cache
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// How many of so many vectors the next tile takes: as many as it can, but no last tile of one vector if avoidable.
INLINE int64_t next_vectors(int64_t left) {
  return left > TILE_VECTORS + 1 ? TILE_VECTORS : left == TILE_VECTORS + 1 ? (left + 1) / 2 : left;
}

// c[r][:] (+)= sum over s of a[r, s] * b[s][:] for TILE_ROWS rows of V vectors; a[r, s] is a[r * a_row + s * a_step].
template <int V, bool ADD>
INLINE void multiply_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t steps,
                          float* c, int64_t c_row) {
  F32 sums[TILE_ROWS][V];
#pragma GCC unroll 8
  for (int r = 0; r < TILE_ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v] = ADD ? load(c + r * c_row + v * LANES) : F32{};
  }
  for (int64_t s = 0; s < steps; ++s) {
    F32 right[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) right[v] = load(b + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; ++r) {
      F32 left = splat(a[r * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] += left * right[v];
    }
    a += a_step;
    b += b_step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < TILE_ROWS; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(c + r * c_row + v * LANES, sums[r][v]);
  }
}

// ---- memory ----

template <class T>
INLINE void load_row(const T* from, int64_t dim, float factor, float* to) {
  int64_t i = 0;
  for (; i + LANES <= dim; i += LANES) store(to + i, load(from + i) * factor);
  if (i < dim) store(to + i, load(from + i, dim - i) * factor);  // the rest of the vector is zero
}

template <class T>
INLINE void store_row(const float* from, int64_t dim, float factor, T* to) {
  int64_t i = 0;
  for (; i + LANES <= dim; i += LANES) store(to + i, load(from + i) * factor);
  if (i < dim) store(to + i, load(from + i) * factor, dim - i);
}

INLINE void fill(float* to, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// Sizes of a block of queries; `lanes` without and `padded` with the lanes that fill the last vector.
struct BlockSize {
  int64_t lanes, padded, dim, padded_dim;
};

INLINE BlockSize block_size(const AttentionShape& shape, const QueryBlock& block) {
  int64_t lanes = (block.last - block.first) * shape.group;
  return {lanes, round_up(lanes, LANES), shape.dim, round_up(shape.dim, LANES)};
}

template <class T>
INLINE void load_queries(Heads<const T> from, const AttentionShape& shape, const QueryBlock& block, int64_t kv_head,
                         float factor, float* rows) {
  BlockSize size = block_size(shape, block);
  for (int64_t token = block.first; token < block.last; ++token) {
    for (int64_t g = 0; g < shape.group; ++g, rows += size.padded_dim) {
      load_row(from.at(token, kv_head * shape.group + g), shape.dim, factor, rows);
    }
  }
  fill(rows, (size.padded - size.lanes) * size.padded_dim, 0.0f);
}

template <class T>
INLINE void load_keys(Heads<const T> from, int64_t dim, int64_t first, int64_t last, int64_t kv_head, float* rows) {
  int64_t padded_dim = round_up(dim, LANES);
  for (int64_t key = first; key < last; ++key, rows += padded_dim) load_row(from.at(key, kv_head), dim, 1.0f, rows);
  fill(rows, (round_up(last - first, TILE_ROWS) - (last - first)) * padded_dim, 0.0f);
}

// rows (lanes, E) to panels of (E, lanes), or back.
template <bool TO_PANELS>
INLINE void transpose_block(float* rows, float* panels, const BlockSize& size) {
  for (int64_t lane = 0, vectors; lane < size.padded; lane += vectors * LANES) {
    vectors = next_vectors((size.padded - lane) / LANES);
    float* panel = panels + lane * size.padded_dim;
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t e = 0; e < size.padded_dim; e += LANES) {
        F32 square[LANES];
        float *row = rows + (lane + v * LANES) * size.padded_dim + e, *column = panel + (e * vectors + v) * LANES;
        float *from = TO_PANELS ? row : column, *to = TO_PANELS ? column : row;
        int64_t from_stride = TO_PANELS ? size.padded_dim : vectors * LANES;
        int64_t to_stride = TO_PANELS ? vectors * LANES : size.padded_dim;
        for (int i = 0; i < LANES; ++i) square[i] = load(from + i * from_stride);
        transpose(square);
        for (int i = 0; i < LANES; ++i) store(to + i * to_stride, square[i]);
      }
    }
  }
}

// The last key that each lane sees, counted from `base`. A lane of padding sees what the last lane sees.
INLINE void last_keys(const AttentionShape& shape, const QueryBlock& block, int64_t base, float* last) {
  BlockSize size = block_size(shape, block);
  int64_t tokens = block.last - block.first, own = block.first + block.shift - base;
  for (int64_t t = 0; t < tokens; ++t) fill(last + t * shape.group, shape.group, float(own + t));
  fill(last + size.lanes, size.padded - size.lanes, float(own + tokens - 1));
}

// Of `count` keys, rows [begin, end) that lanes with last keys from `lowest` to `highest` see, in whole tiles; `masked`
// if not all lanes see all of them.
struct VisibleKeys {
  int64_t begin, end;
  bool masked;
};

INLINE VisibleKeys visible_keys(int64_t lowest, int64_t highest, int64_t window, int64_t count) {
  int64_t begin = lowest - window + 1 < 0 ? 0 : lowest - window + 1, end = highest + 1 < count ? highest + 1 : count;
  if (begin >= end) return {0, 0, false};
  begin = begin / TILE_ROWS * TILE_ROWS;
  end = round_up(end, TILE_ROWS);
  return {begin, end, end > lowest + 1 || begin < highest - window + 1};
}

INLINE I32 is_visible(int64_t key, F32 last, float window) {
  F32 number = splat(float(key));
  return (number <= last) & (number > last - window);
}

struct Scratch {
  float* next;
  int64_t size = 0;

  float* take(int64_t count) {
    float* taken = next + size;
    size += round_up(count, 16);
    return taken;
  }
};

INLINE int64_t most_lanes(const AttentionShape& shape) {
  return round_up(shape.group > ATTENTION_LANES ? shape.group : ATTENTION_LANES, LANES);
}
