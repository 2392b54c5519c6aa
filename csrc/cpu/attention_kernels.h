// Attention of one block of queries to the keys it sees, and its gradients, in fp32.
//
// Vectors run along *queries*: lane (t - first) * group + g is query token t of the g-th head that shares the key head.
// So scores stand as S^T[key][lane] = K Q^T: the maximum, the sum and everything else that softmax does per query is
// element-wise, and keys and values are read as they lie in memory, one element broadcast to a vector of queries:
//
//     S^T = K Q^T    dP^T = V dO^T    O^T += V^T P^T    dQ^T += K^T dS^T      (keys or E) x lanes
//     dV += P^T dO   dK += dS^T Q                                             keys x E
//
// Only Q, dO and their results change layout, once per block. What is (E, lanes) is stored in panels: up to
// TILE_VECTORS vectors of lanes with all their E, one after the other. E is padded to whole vectors with zeros.

constexpr int TILE_ROWS = LANES == 16 ? 8 : 4, TILE_VECTORS = LANES == 4 ? 2 : 3;  // accumulators that fit in registers
constexpr int64_t KEYS = ATTENTION_KEYS;  // a multiple of TILE_ROWS; S^T of a panel stays in the first-level cache
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

#define INLINE static inline __attribute__((always_inline))

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

// ---- forward ----

struct ForwardScratch {
  float *rows, *q, *out, *max, *sum, *last, *keys, *values, *scores;
  int64_t size;

  ForwardScratch(const AttentionShape& shape, float* memory) {
    Scratch scratch{memory};
    int64_t lanes = most_lanes(shape), dim = round_up(shape.dim, LANES);
    rows = scratch.take(lanes * dim);
    q = scratch.take(lanes * dim);
    out = scratch.take(lanes * dim);
    max = scratch.take(lanes);
    sum = scratch.take(lanes);
    last = scratch.take(lanes);
    keys = scratch.take(KEYS * dim);
    values = scratch.take(KEYS * dim);
    scores = scratch.take(KEYS * TILE_VECTORS * LANES);
    size = scratch.size;
  }
};

// One panel of queries meets `count` keys: online softmax (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1).
// `offset` is the first key's number as `last` counts. Scores are in base 2.
template <int V>
void attend(const ForwardScratch& scratch, int64_t lane, int64_t offset, int64_t count, const AttentionShape& shape) {
  constexpr int64_t WIDTH = V * LANES;
  int64_t padded_dim = round_up(shape.dim, LANES);
  const float *last = scratch.last + lane, *q = scratch.q + lane * padded_dim;
  float *out = scratch.out + lane * padded_dim, *scores = scratch.scores;
  VisibleKeys keys =
      visible_keys(int64_t(last[0]) - offset, int64_t(last[WIDTH - 1]) - offset, shape.window, count);
  if (keys.begin == keys.end) return;
  for (int64_t j = keys.begin; j < keys.end; j += TILE_ROWS) {
    const float* key = scratch.keys + j * padded_dim;
    multiply_tile<V, false>(key, padded_dim, 1, q, WIDTH, shape.dim, scores + j * WIDTH, WIDTH);
  }
  F32 rescale[V];
  for (int v = 0; v < V; ++v) {
    F32 seen_to = load(last + v * LANES), old_max = load(scratch.max + lane + v * LANES), max = old_max;
    float* column = scores + v * LANES;
    if (keys.masked) {
      for (int64_t j = keys.begin; j < keys.end; ++j) {
        I32 visible = is_visible(offset + j, seen_to, float(shape.window));
        store(column + j * WIDTH, visible ? load(column + j * WIDTH) : splat(-__builtin_inff()));
      }
    }
    for (int64_t j = keys.begin; j < keys.end; ++j) max = at_least(load(column + j * WIDTH), max);
    rescale[v] = exp2(old_max - max);
    F32 sum = load(scratch.sum + lane + v * LANES) * rescale[v];
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      F32 probability = exp2(load(column + j * WIDTH) - max);
      sum += probability;
      store(column + j * WIDTH, probability);
    }
    store(scratch.max + lane + v * LANES, max);
    store(scratch.sum + lane + v * LANES, sum);
  }
  for (int64_t e = 0; e < padded_dim; ++e) {
    for (int v = 0; v < V; ++v) store(out + e * WIDTH + v * LANES, load(out + e * WIDTH + v * LANES) * rescale[v]);
  }
  for (int64_t e = 0; e < padded_dim; e += TILE_ROWS) {
    multiply_tile<V, true>(scratch.values + keys.begin * padded_dim + e, 1, padded_dim, scores + keys.begin * WIDTH,
                           WIDTH, keys.end - keys.begin, out + e * WIDTH, WIDTH);
  }
}

template <class T>
void attention(const AttentionForward<T>& tensors, QueryBlock block, int64_t kv_head, float* memory) {
  const AttentionShape& shape = tensors.shape;
  ForwardScratch scratch(shape, memory);
  BlockSize size = block_size(shape, block);
  int64_t window_begin = block.first + block.shift - shape.window + 1;
  int64_t base = window_begin > block.first_key ? window_begin : block.first_key, end = block.last + block.shift;
  load_queries(tensors.q, shape, block, kv_head, LOG2_E / __builtin_sqrtf(float(shape.dim)), scratch.rows);
  transpose_block<true>(scratch.rows, scratch.q, size);
  last_keys(shape, block, base, scratch.last);
  fill(scratch.out, size.padded * size.padded_dim, 0.0f);
  fill(scratch.sum, size.padded, 0.0f);
  fill(scratch.max, size.padded, -0x1.fffffep127f);  // finite: before the first visible key, max - max must be 0
  for (int64_t first = base; first < end; first += KEYS) {
    int64_t count = end - first < KEYS ? end - first : KEYS;
    load_keys(tensors.k, shape.dim, first, first + count, kv_head, scratch.keys);
    load_keys(tensors.v, shape.dim, first, first + count, kv_head, scratch.values);
    for (int64_t lane = 0, vectors; lane < size.padded; lane += vectors * LANES) {
      vectors = next_vectors((size.padded - lane) / LANES);
      auto* kernel = vectors == TILE_VECTORS ? attend<TILE_VECTORS> : vectors == 2 ? attend<2> : attend<1>;
      kernel(scratch, lane, first - base, count, shape);
    }
  }
  transpose_block<false>(scratch.rows, scratch.out, size);
  for (int64_t lane = 0; lane < size.lanes; ++lane) {
    int64_t token = block.first + lane / shape.group, head = kv_head * shape.group + lane % shape.group;
    float sum = scratch.sum[lane];
    store_row(scratch.rows + lane * size.padded_dim, shape.dim, 1.0f / sum, tensors.out.at(token, head));
    tensors.lse[token * shape.heads + head] = scratch.max[lane] * LN_2 + __builtin_logf(sum);
  }
}

// ---- backward ----

struct BackwardScratch {
  float *q_rows, *dout_rows, *q, *dout, *dq, *last, *lse, *delta, *keys, *values, *probabilities, *dscores, *dk, *dv;
  int64_t size;

  BackwardScratch(const AttentionShape& shape, float* memory) {
    Scratch scratch{memory};
    int64_t lanes = most_lanes(shape), dim = round_up(shape.dim, LANES);
    int64_t chunk_keys = round_up(shape.most_keys, TILE_ROWS);
    q_rows = scratch.take(lanes * dim);
    dout_rows = scratch.take(lanes * dim);
    q = scratch.take(lanes * dim);
    dout = scratch.take(lanes * dim);
    dq = scratch.take(lanes * dim);
    last = scratch.take(lanes);
    lse = scratch.take(lanes);
    delta = scratch.take(lanes);
    keys = scratch.take(KEYS * dim);
    values = scratch.take(KEYS * dim);
    probabilities = scratch.take(KEYS * lanes);
    dscores = scratch.take(KEYS * lanes);
    dk = scratch.take(chunk_keys * dim);
    dv = scratch.take(chunk_keys * dim);
    size = scratch.size;
  }
};

// One panel of queries against `count` keys: P^T and dS^T for these lanes, and their part of dQ^T.
template <int V>
void attend_backward(const BackwardScratch& scratch, int64_t lane, int64_t lanes, int64_t offset, int64_t count,
                     const AttentionShape& shape) {
  constexpr int64_t WIDTH = V * LANES;
  int64_t padded_dim = round_up(shape.dim, LANES);
  const float *last = scratch.last + lane, *q = scratch.q + lane * padded_dim, *dout = scratch.dout + lane * padded_dim;
  float *probabilities = scratch.probabilities + lane, *dscores = scratch.dscores + lane;
  VisibleKeys keys =
      visible_keys(int64_t(last[0]) - offset, int64_t(last[WIDTH - 1]) - offset, shape.window, count);
  if (keys.begin == keys.end) return;
  for (int64_t j = keys.begin; j < keys.end; j += TILE_ROWS) {
    const float *key = scratch.keys + j * padded_dim, *value = scratch.values + j * padded_dim;
    multiply_tile<V, false>(key, padded_dim, 1, q, WIDTH, shape.dim, probabilities + j * lanes, lanes);
    multiply_tile<V, false>(value, padded_dim, 1, dout, WIDTH, shape.dim, dscores + j * lanes, lanes);
  }
  for (int v = 0; v < V; ++v) {
    F32 seen_to = load(last + v * LANES), lse = load(scratch.lse + lane + v * LANES);
    F32 delta = load(scratch.delta + lane + v * LANES);
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      float *score = probabilities + j * lanes + v * LANES, *dscore = dscores + j * lanes + v * LANES;
      F32 probability = exp2(load(score) - lse);
      F32 gradient = probability * (load(dscore) - delta);
      if (keys.masked) {
        I32 visible = is_visible(offset + j, seen_to, float(shape.window));
        probability = visible ? probability : F32{};
        gradient = visible ? gradient : F32{};
      }
      store(score, probability);
      store(dscore, gradient);
    }
  }
  for (int64_t e = 0; e < padded_dim; e += TILE_ROWS) {
    multiply_tile<V, true>(scratch.keys + keys.begin * padded_dim + e, 1, padded_dim, dscores + keys.begin * lanes,
                           lanes, keys.end - keys.begin, scratch.dq + lane * padded_dim + e * WIDTH, WIDTH);
  }
}

// V vectors of the gradients of `count` keys, from row `first_row` of the chunk on: dV += P^T dO and dK += dS^T Q, by the
// lanes that see them.
template <int V>
void add_key_gradients(const BackwardScratch& scratch, const BlockSize& size, int64_t e, int64_t first_row,
                       int64_t count, int64_t own, const AttentionShape& shape) {
  int64_t tokens = size.lanes / shape.group;
  for (int64_t j = 0; j < count; j += TILE_ROWS) {
    // Row j of the block is the own key of token j - own.
    int64_t first = j - own, last = j - own + TILE_ROWS - 1 + shape.window;
    first = (first < 0 ? 0 : first) * shape.group;
    last = (last > tokens ? tokens : last) * shape.group;
    if (first >= last) continue;
    int64_t from = j * size.padded + first, rows = first * size.padded_dim + e;
    int64_t to = (first_row + j) * size.padded_dim + e;
    multiply_tile<V, true>(scratch.probabilities + from, size.padded, 1, scratch.dout_rows + rows, size.padded_dim,
                           last - first, scratch.dv + to, size.padded_dim);
    multiply_tile<V, true>(scratch.dscores + from, size.padded, 1, scratch.q_rows + rows, size.padded_dim,
                           last - first, scratch.dk + to, size.padded_dim);
  }
}

// What the keys of `block` get from its queries is added to dK and dV in scratch; what the queries get from these keys
// replaces dq, in which block.first is token `dq_token`.
template <class T, class DQ>
void attention_backward_block(const AttentionBackward<T>& tensors, QueryBlock block, int64_t kv_head, Heads<DQ> dq,
                              int64_t dq_token, float* memory) {
  const AttentionShape& shape = tensors.shape;
  BackwardScratch scratch(shape, memory);
  BlockSize size = block_size(shape, block);
  float scale = 1.0f / __builtin_sqrtf(float(shape.dim));
  int64_t own = block.first + block.shift - block.first_key;  // row of the first query's own key
  int64_t begin = own - shape.window + 1, end = own + block.last - block.first;
  begin = begin < 0 ? 0 : begin / KEYS * KEYS;
  if (end > block.last_key - block.first_key) end = block.last_key - block.first_key;
  load_queries(tensors.q, shape, block, kv_head, scale * LOG2_E, scratch.q_rows);
  load_queries(tensors.dout, shape, block, kv_head, 1.0f, scratch.dout_rows);
  transpose_block<true>(scratch.q_rows, scratch.q, size);
  transpose_block<true>(scratch.dout_rows, scratch.dout, size);
  last_keys(shape, block, block.first_key, scratch.last);
  fill(scratch.dq, size.padded * size.padded_dim, 0.0f);
  fill(scratch.lse + size.lanes, size.padded - size.lanes, 0.0f);
  fill(scratch.delta + size.lanes, size.padded - size.lanes, 0.0f);
  for (int64_t lane = 0; lane < size.lanes; ++lane) {
    int64_t token = block.first + lane / shape.group, head = kv_head * shape.group + lane % shape.group;
    const float* dout = scratch.dout_rows + lane * size.padded_dim;
    const T* out = tensors.out.at(token, head);
    F32 products{};
    int64_t e = 0;
    for (; e + LANES <= shape.dim; e += LANES) products += load(out + e) * load(dout + e);
    if (e < shape.dim) products += load(out + e, shape.dim - e) * load(dout + e);
    scratch.delta[lane] = sum(products);
    scratch.lse[lane] = tensors.lse[token * shape.heads + head] * LOG2_E;
  }
  for (int64_t first = begin; first < end; first += KEYS) {
    int64_t count = end - first < KEYS ? end - first : KEYS, key = block.first_key + first;
    load_keys(tensors.k, shape.dim, key, key + count, kv_head, scratch.keys);
    load_keys(tensors.v, shape.dim, key, key + count, kv_head, scratch.values);
    for (int64_t lane = 0, vectors; lane < size.padded; lane += vectors * LANES) {
      vectors = next_vectors((size.padded - lane) / LANES);
      auto* kernel = vectors == TILE_VECTORS ? attend_backward<TILE_VECTORS>
                     : vectors == 2          ? attend_backward<2>
                                             : attend_backward<1>;
      kernel(scratch, lane, size.padded, first, count, shape);
    }
    for (int64_t e = 0, vectors; e < size.padded_dim; e += vectors * LANES) {
      vectors = next_vectors((size.padded_dim - e) / LANES);
      auto* kernel = vectors == TILE_VECTORS ? add_key_gradients<TILE_VECTORS>
                     : vectors == 2          ? add_key_gradients<2>
                                             : add_key_gradients<1>;
      kernel(scratch, size, e, first, count, own - first, shape);
    }
  }
  transpose_block<false>(scratch.q_rows, scratch.dq, size);
  for (int64_t lane = 0; lane < size.lanes; ++lane) {
    int64_t token = dq_token + lane / shape.group, head = kv_head * shape.group + lane % shape.group;
    store_row(scratch.q_rows + lane * size.padded_dim, shape.dim, scale, dq.at(token, head));
  }
}

// dK and dV of the keys of `chunk` from all of its queries, and what the queries get from these keys: into dq, or, if
// the document has several chunks, into rows (H, E) in fp32 for the queries of this chunk alone.
template <class T>
void attention_backward(const AttentionBackward<T>& tensors, QueryBlock chunk, int64_t kv_head, float* own_dq,
                        float* memory) {
  const AttentionShape& shape = tensors.shape;
  BackwardScratch scratch(shape, memory);
  int64_t keys = chunk.last_key - chunk.first_key, padded_dim = round_up(shape.dim, LANES);
  fill(scratch.dk, round_up(keys, TILE_ROWS) * padded_dim, 0.0f);
  fill(scratch.dv, round_up(keys, TILE_ROWS) * padded_dim, 0.0f);
  int64_t num_blocks = num_query_blocks(chunk.last - chunk.first, shape.group);
  for (int64_t i = 0; i < num_blocks; ++i) {
    QueryBlock block = query_block(chunk, i, num_blocks);
    if (own_dq == nullptr) {
      attention_backward_block(tensors, block, kv_head, tensors.dq, block.first, memory);
    } else {
      Heads<float> dq{own_dq, shape.heads * shape.dim, shape.dim};
      attention_backward_block(tensors, block, kv_head, dq, block.first - chunk.first, memory);
    }
  }
  for (int64_t key = 0; key < keys; ++key) {
    const float *dk = scratch.dk + key * padded_dim, *dv = scratch.dv + key * padded_dim;
    store_row(dk, shape.dim, LN_2, tensors.dk.at(chunk.first_key + key, kv_head));  // Q was scaled for base 2
    store_row(dv, shape.dim, 1.0f, tensors.dv.at(chunk.first_key + key, kv_head));
  }
}

// The sum of `count` rows of fp32, in order.
template <class T>
void sum_rows(const float* const* from, int64_t count, int64_t width, T* to) {
  for (int64_t i = 0; i < width; i += LANES) {
    int64_t elements = width - i < LANES ? width - i : LANES;
    F32 total = load(from[0] + i, elements);
    for (int64_t row = 1; row < count; ++row) total += load(from[row] + i, elements);
    store(to + i, total, elements);
  }
}

inline int64_t forward_scratch(const AttentionShape& shape) { return ForwardScratch(shape, nullptr).size; }
inline int64_t backward_scratch(const AttentionShape& shape) { return BackwardScratch(shape, nullptr).size; }

#undef INLINE
