// Gradients of the keys of a chunk and of the queries that see them; see attention_kernels.h.

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

// V vectors of the gradients of `count` keys, from row `first_row` of the chunk on: dV += P^T dO and dK += dS^T Q, by
// the lanes that see them.
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

inline int64_t backward_scratch(const AttentionShape& shape) { return BackwardScratch(shape, nullptr).size; }
