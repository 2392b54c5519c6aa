// Gradients of the keys of a chunk and of the queries that see them; see attention_kernels.h.

template <class Element>
struct BackwardScratch {
  Element *q_rows, *q_over_lanes, *dout_rows, *dout_over_lanes, *q, *dout, *keys, *keys_over_keys, *values;
  Element *probabilities, *dscores, *dscores_over_keys;
  float *dq_rows, *dq, *last, *lse, *delta, *dk, *dv;
  int64_t size;

  BackwardScratch(const AttentionShape& shape, float* memory) {
    Scratch scratch{memory};
    int64_t lanes = most_lanes(shape), dim = padded_dim_of<Element>(shape);
    int64_t chunk_keys = round_up(shape.most_keys, TILE_ROWS);
    q_rows = scratch.take<Element>(lanes * dim);
    q_over_lanes = scratch.take_pairs(q_rows, lanes * dim);
    dout_rows = scratch.take<Element>(lanes * dim);
    dout_over_lanes = scratch.take_pairs(dout_rows, lanes * dim);
    q = scratch.take<Element>(lanes * dim);
    dout = scratch.take<Element>(lanes * dim);
    keys = scratch.take<Element>(KEYS * dim);
    keys_over_keys = scratch.take_pairs(keys, KEYS * dim);
    values = scratch.take<Element>(KEYS * dim);
    probabilities = scratch.take<Element>(KEYS * lanes);
    dscores = scratch.take<Element>(KEYS * lanes);
    dscores_over_keys = scratch.take_pairs(dscores, KEYS * lanes);
    dq_rows = scratch.take(lanes * dim);
    dq = scratch.take(lanes * dim);
    last = scratch.take(lanes);
    lse = scratch.take(lanes);
    delta = scratch.take(lanes);
    dk = scratch.take(chunk_keys * dim);
    dv = scratch.take(chunk_keys * dim);
    size = scratch.size;
  }
};

// One panel of queries against `count` keys: P^T and dS^T for these lanes, and their part of dQ^T.
template <int V, class Element>
void attend_backward(const BackwardScratch<Element>& scratch, int64_t lane, int64_t lanes, int64_t offset,
                     int64_t count, float factor, const AttentionShape& shape) {
  constexpr int64_t WIDTH = V * LANES, STEP = TERMS<Element>;
  int64_t padded_dim = padded_dim_of<Element>(shape), steps = (shape.dim + STEP - 1) / STEP;
  const float* last = scratch.last + lane;
  const Element *q = scratch.q + lane * padded_dim, *dout = scratch.dout + lane * padded_dim;
  VisibleKeys keys =
      visible_keys(int64_t(last[0]) - offset, int64_t(last[WIDTH - 1]) - offset, shape.window, count);
  if (keys.begin == keys.end) return;
  for (int64_t j = keys.begin; j < keys.end; j += TILE_ROWS) {
    float scores[TILE_ROWS * WIDTH], dprobabilities[TILE_ROWS * WIDTH];
    Tile<V> tile{};
    tile.add_product_of(scratch.keys + j * padded_dim, padded_dim, STEP, q, STEP * WIDTH, steps);
    tile.store_rows(scores, WIDTH);
    tile = {};
    tile.add_product_of(scratch.values + j * padded_dim, padded_dim, STEP, dout, STEP * WIDTH, steps);
    tile.store_rows(dprobabilities, WIDTH);
    for (int v = 0; v < V; ++v) {
      F32 seen_to = load(last + v * LANES), lse = load(scratch.lse + lane + v * LANES);
      F32 delta = load(scratch.delta + lane + v * LANES);
      for (int64_t r = 0; r < TILE_ROWS; r += STEP) {
        F32 dscore[STEP];
        int64_t to = (j + r) * lanes + lane + v * LANES;
#pragma GCC unroll 2
        for (int t = 0; t < STEP; ++t) {
          int64_t from = (r + t) * WIDTH + v * LANES;
          F32 probability = exp2(load(scores + from) * factor - lse);
          dscore[t] = probability * (load(dprobabilities + from) - delta);
          if (keys.masked) {
            I32 visible = is_visible(offset + j + r + t, seen_to, float(shape.window));
            probability = visible ? probability : F32{};
            dscore[t] = visible ? dscore[t] : F32{};
          }
          store(scratch.probabilities + to + t * lanes, probability);
          store(scratch.dscores + to + t * lanes, dscore[t]);
        }
        if (STEP > 1) store_terms(scratch.dscores_over_keys + (j + r) * lanes + (lane + v * LANES) * STEP, dscore);
      }
    }
  }
  float* dq = scratch.dq + lane * padded_dim;
  for (int64_t e = 0; e < shape.dim; e += TILE_ROWS) {
    Tile<V> tile;
    tile.load_rows(dq + e * WIDTH, WIDTH);
    tile.add_product_of(scratch.keys_over_keys + keys.begin * padded_dim + e * STEP, STEP, STEP * padded_dim,
                        scratch.dscores_over_keys + keys.begin * lanes + lane * STEP, STEP * lanes,
                        (keys.end - keys.begin) / STEP);
    tile.store_rows(dq + e * WIDTH, WIDTH);
  }
}

// V vectors of the gradients of `count` keys, from row `first_row` of the chunk on: dV += P^T dO and dK += dS^T Q, by
// the lanes that see them.
template <int V, class Element>
void add_key_gradients(const BackwardScratch<Element>& scratch, const BlockSize& size, int64_t e, int64_t first_row,
                       int64_t count, int64_t own, const AttentionShape& shape) {
  constexpr int64_t STEP = TERMS<Element>;
  int64_t tokens = size.lanes / shape.group;
  for (int64_t j = 0; j < count; j += TILE_ROWS) {
    // Row j of the block is the own key of token j - own.
    int64_t first = j - own, last = j - own + TILE_ROWS - 1 + shape.window;
    first = (first < 0 ? 0 : first) * shape.group / STEP * STEP;  // P and dS are zero in the lane that fills up a step
    last = (last > tokens ? tokens : last) * shape.group;
    if (first >= last) continue;
    int64_t from = j * size.padded + first, rows = first * size.padded_dim + e * STEP;
    int64_t to = (first_row + j) * size.padded_dim + e, steps = (last - first + STEP - 1) / STEP;
    Tile<V> tile;
    tile.load_rows(scratch.dv + to, size.padded_dim);
    tile.add_product_of(scratch.probabilities + from, size.padded, STEP, scratch.dout_over_lanes + rows,
                        STEP * size.padded_dim, steps);
    tile.store_rows(scratch.dv + to, size.padded_dim);
    tile.load_rows(scratch.dk + to, size.padded_dim);
    tile.add_product_of(scratch.dscores + from, size.padded, STEP, scratch.q_over_lanes + rows,
                        STEP * size.padded_dim, steps);
    tile.store_rows(scratch.dk + to, size.padded_dim);
  }
}

// What the keys of `block` get from its queries is added to dK and dV in scratch; what the queries get from these keys
// replaces dq, in which block.first is token `dq_token`.
template <class T, class DQ>
void attention_backward_block(const AttentionBackward<T>& tensors, QueryBlock block, int64_t kv_head, Heads<DQ> dq,
                              int64_t dq_token, float* memory) {
  using Element = typename Operand<T>::Element;
  const AttentionShape& shape = tensors.shape;
  BackwardScratch<Element> scratch(shape, memory);
  BlockSize size = block_size<Element>(shape, block);
  float scale = 1.0f / __builtin_sqrtf(float(shape.dim));
  int64_t own = block.first + block.shift - block.first_key;  // row of the first query's own key
  int64_t begin = own - shape.window + 1, end = own + block.last - block.first;
  begin = begin < 0 ? 0 : begin / KEYS * KEYS;
  if (end > block.last_key - block.first_key) end = block.last_key - block.first_key;
  load_queries(tensors.q, shape, block, kv_head, scratch.q_rows);
  load_queries(tensors.dout, shape, block, kv_head, scratch.dout_rows);
  to_panels(scratch.q_rows, scratch.q, size);
  to_panels(scratch.dout_rows, scratch.dout, size);
  pair_rows(scratch.q_rows, size.padded, size.padded_dim, scratch.q_over_lanes);
  pair_rows(scratch.dout_rows, size.padded, size.padded_dim, scratch.dout_over_lanes);
  last_keys(shape, block, block.first_key, scratch.last);
  fill_with_zeros(scratch.dq, size.padded * size.padded_dim);
  fill_with_zeros(scratch.lse + size.lanes, size.padded - size.lanes);
  fill_with_zeros(scratch.delta + size.lanes, size.padded - size.lanes);
  for (int64_t lane = 0; lane < size.lanes; ++lane) {
    int64_t token = block.first + lane / shape.group, head = kv_head * shape.group + lane % shape.group;
    const Element* dout = scratch.dout_rows + lane * size.padded_dim;
    const T* out = tensors.out.at(token, head);
    prefetch_row(tensors.out, token, head, shape.dim);
    F32 products{};
    int64_t e = 0;
    for (; e + LANES <= shape.dim; e += LANES) products += load(out + e) * load(dout + e);
    if (e < shape.dim) products += load(out + e, shape.dim - e) * load(dout + e);
    scratch.delta[lane] = sum(products);
    scratch.lse[lane] = tensors.lse[token * shape.heads + head] * LOG2_E;
  }
  for (int64_t first = begin; first < end; first += KEYS) {
    int64_t count = end - first < KEYS ? end - first : KEYS, key = block.first_key + first;
    load_keys(tensors.k, shape, block, key, key + count, kv_head, scratch.keys);
    load_keys(tensors.v, shape, block, key, key + count, kv_head, scratch.values);
    pair_rows(scratch.keys, round_up(count, TILE_ROWS), size.padded_dim, scratch.keys_over_keys);
    for (int64_t lane = 0, vectors; lane < size.padded; lane += vectors * LANES) {
      vectors = next_vectors((size.padded - lane) / LANES);
      auto* kernel = vectors == TILE_VECTORS ? attend_backward<TILE_VECTORS, Element>
                     : vectors == 2          ? attend_backward<2, Element>
                                             : attend_backward<1, Element>;
      kernel(scratch, lane, size.padded, first, count, scale * LOG2_E, shape);
    }
    int64_t width = round_up(shape.dim, LANES);
    for (int64_t e = 0, vectors; e < width; e += vectors * LANES) {
      vectors = next_vectors((width - e) / LANES);
      auto* kernel = vectors == TILE_VECTORS ? add_key_gradients<TILE_VECTORS, Element>
                     : vectors == 2          ? add_key_gradients<2, Element>
                                             : add_key_gradients<1, Element>;
      kernel(scratch, size, e, first, count, own - first, shape);
    }
  }
  transpose_block<false>(scratch.dq_rows, scratch.dq, size.padded, size.padded_dim);
  for (int64_t lane = 0; lane < size.lanes; ++lane) {
    int64_t token = dq_token + lane / shape.group, head = kv_head * shape.group + lane % shape.group;
    store_row(scratch.dq_rows + lane * size.padded_dim, shape.dim, scale, dq.at(token, head));
  }
}

// dK and dV of the keys of `chunk` from all of its queries, and what the queries get from these keys: into dq, or, if
// the document has several chunks, into rows (H, E) in fp32 for the queries of this chunk alone. What shared keys get
// goes into rows (K, E) in fp32 for this document alone.
template <class T>
void attention_backward(const AttentionBackward<T>& tensors, QueryBlock chunk, int64_t kv_head, OwnParts own,
                        float* memory) {
  using Element = typename Operand<T>::Element;
  const AttentionShape& shape = tensors.shape;
  BackwardScratch<Element> scratch(shape, memory);
  int64_t keys = chunk.last_key - chunk.first_key, padded_dim = padded_dim_of<Element>(shape);
  fill_with_zeros(scratch.dk, round_up(keys, TILE_ROWS) * padded_dim);
  fill_with_zeros(scratch.dv, round_up(keys, TILE_ROWS) * padded_dim);
  int64_t num_blocks = num_query_blocks(chunk.last - chunk.first, shape.group);
  for (int64_t i = 0; i < num_blocks; ++i) {
    QueryBlock block = query_block(chunk, i, num_blocks);
    if (own.dq == nullptr) {
      attention_backward_block(tensors, block, kv_head, tensors.dq, block.first, memory);
    } else {
      Heads<float> dq{own.dq, shape.heads * shape.dim, shape.dim};
      attention_backward_block(tensors, block, kv_head, dq, block.first - chunk.first, memory);
    }
  }
  float scale = 1.0f / __builtin_sqrtf(float(shape.dim));
  int64_t kv_heads = shape.heads / shape.group;
  for (int64_t key = chunk.first_key; key < chunk.last_key; ++key) {
    int64_t row = row_of_key(shape, chunk, key);
    const float* dk = scratch.dk + (key - chunk.first_key) * padded_dim;
    const float* dv = scratch.dv + (key - chunk.first_key) * padded_dim;
    if (key < chunk.own_key) {
      store_row(dk, shape.dim, scale, own.shared + (row * kv_heads + kv_head) * shape.dim);
      store_row(dv, shape.dim, 1.0f, own.shared + ((shape.shared + row) * kv_heads + kv_head) * shape.dim);
    } else {
      store_row(dk, shape.dim, scale, tensors.dk.at(row, kv_head));
      store_row(dv, shape.dim, 1.0f, tensors.dv.at(row, kv_head));
    }
  }
}

// The sum of `count` rows of fp32, in order.
template <class T>
void sum_rows(const float* const* from, int64_t count, int64_t width, T* to) {
  for (int64_t i = 0; i < width; i += LANES) {
    int64_t elements = width - i < LANES ? width - i : LANES;
    F32 total{};
    for (int64_t row = 0; row < count; ++row) total += load(from[row] + i, elements);
    store(to + i, total, elements);
  }
}

template <class T>
int64_t backward_scratch(const AttentionShape& shape) {
  return BackwardScratch<typename Operand<T>::Element>(shape, nullptr).size;
}
