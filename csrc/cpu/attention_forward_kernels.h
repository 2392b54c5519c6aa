// A block of queries attends to its keys; see attention_kernels.h.

template <class Element>
struct ForwardScratch {
  Element *q_rows, *q, *keys, *values, *values_over_keys, *probabilities;
  float *out_rows, *out, *max, *sum, *last, *scores;
  int64_t size;

  ForwardScratch(const AttentionShape& shape, float* memory) {
    Scratch scratch{memory};
    int64_t lanes = most_lanes(shape), dim = padded_dim_of<Element>(shape);
    q_rows = scratch.take<Element>(lanes * dim);
    q = scratch.take<Element>(lanes * dim);
    keys = scratch.take<Element>(KEYS * dim);
    values = scratch.take<Element>(KEYS * dim);
    values_over_keys = scratch.take_pairs(values, KEYS * dim);
    scores = scratch.take(KEYS * TILE_VECTORS * LANES);
    probabilities = (Element*)scores;  // row by row in place of the scores
    out_rows = scratch.take(lanes * dim);
    out = scratch.take(lanes * dim);
    max = scratch.take(lanes);
    sum = scratch.take(lanes);
    last = scratch.take(lanes);
    size = scratch.size;
  }
};

// One panel of queries meets `count` keys: online softmax (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1).
// `offset` is the first key's number as `last` counts; scores times `factor` are in base 2.
template <int V, class Element>
void attend(const ForwardScratch<Element>& scratch, int64_t lane, int64_t offset, int64_t count, float factor,
            const AttentionShape& shape) {
  constexpr int64_t WIDTH = V * LANES, STEP = TERMS<Element>;
  int64_t padded_dim = padded_dim_of<Element>(shape), steps = (shape.dim + STEP - 1) / STEP;
  const float* last = scratch.last + lane;
  const Element *q = scratch.q + lane * padded_dim;
  float *out = scratch.out + lane * padded_dim, *scores = scratch.scores;
  VisibleKeys keys =
      visible_keys(int64_t(last[0]) - offset, int64_t(last[WIDTH - 1]) - offset, shape.window, count);
  if (keys.begin == keys.end) return;
  F32 old_max[V], max[V], rescale[V];
  for (int v = 0; v < V; ++v) old_max[v] = max[v] = load(scratch.max + lane + v * LANES);
  for (int64_t j = keys.begin; j < keys.end; j += TILE_ROWS) {
    Tile<V> tile{};
    tile.add_product_of(scratch.keys + j * padded_dim, padded_dim, STEP, q, STEP * WIDTH, steps);
    if (keys.masked) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        F32 seen_to = load(last + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < TILE_ROWS; ++r) {
          I32 visible = is_visible(offset + j + r, seen_to, float(shape.window));
          tile.at[r][v] = visible ? tile.at[r][v] : splat(-__builtin_inff());
        }
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
      for (int r = 0; r < TILE_ROWS; ++r) max[v] = at_least(tile.at[r][v], max[v]);
    }
    tile.store_rows(scores + j * WIDTH, WIDTH);
  }
  for (int v = 0; v < V; ++v) {
    rescale[v] = exp2((old_max[v] - max[v]) * factor);
    F32 sum = load(scratch.sum + lane + v * LANES) * rescale[v];
    for (int64_t j = keys.begin; j < keys.end; j += STEP) {
      F32 probability[STEP];
#pragma GCC unroll 2
      for (int t = 0; t < STEP; ++t) {
        probability[t] = exp2((load(scores + (j + t) * WIDTH + v * LANES) - max[v]) * factor);
        sum += probability[t];
      }
      store_terms(scratch.probabilities + j * WIDTH + v * LANES * STEP, probability);
    }
    store(scratch.max + lane + v * LANES, max[v]);
    store(scratch.sum + lane + v * LANES, sum);
  }
  for (int64_t e = 0; e < shape.dim; e += TILE_ROWS) {
    Tile<V> tile;
    tile.load_rows(out + e * WIDTH, WIDTH);
#pragma GCC unroll 8
    for (int r = 0; r < TILE_ROWS; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) tile.at[r][v] *= rescale[v];
    }
    tile.add_product_of(scratch.values_over_keys + keys.begin * padded_dim + e * STEP, STEP, STEP * padded_dim,
                        scratch.probabilities + keys.begin * WIDTH, STEP * WIDTH, (keys.end - keys.begin) / STEP);
    tile.store_rows(out + e * WIDTH, WIDTH);
  }
}

template <class T>
void attention(const AttentionForward<T>& tensors, QueryBlock block, int64_t kv_head, float* memory) {
  using Element = typename Operand<T>::Element;
  const AttentionShape& shape = tensors.shape;
  ForwardScratch<Element> scratch(shape, memory);
  BlockSize size = block_size<Element>(shape, block);
  float scale = 1.0f / __builtin_sqrtf(float(shape.dim));
  int64_t window_begin = block.first + block.shift - shape.window + 1;
  int64_t base = window_begin > block.first_key ? window_begin : block.first_key, end = block.last + block.shift;
  load_queries(tensors.q, shape, block, kv_head, scratch.q_rows);
  to_panels(scratch.q_rows, scratch.q, size);
  last_keys(shape, block, base, scratch.last);
  fill_with_zeros(scratch.out, size.padded * size.padded_dim);
  fill_with_zeros(scratch.sum, size.padded);
  fill(scratch.max, size.padded, -0x1.fffffep127f);  // finite: before the first visible key, max - max must be 0
  for (int64_t first = base; first < end; first += KEYS) {
    int64_t count = end - first < KEYS ? end - first : KEYS;
    load_keys(tensors.k, shape, block, first, first + count, kv_head, scratch.keys);
    load_keys(tensors.v, shape, block, first, first + count, kv_head, scratch.values);
    pair_rows(scratch.values, round_up(count, TILE_ROWS), size.padded_dim, scratch.values_over_keys);
    for (int64_t lane = 0, vectors; lane < size.padded; lane += vectors * LANES) {
      vectors = next_vectors((size.padded - lane) / LANES);
      auto* kernel = vectors == TILE_VECTORS ? attend<TILE_VECTORS, Element>
                     : vectors == 2          ? attend<2, Element>
                                             : attend<1, Element>;
      kernel(scratch, lane, first - base, count, scale * LOG2_E, shape);
    }
  }
  transpose_block<false>(scratch.out_rows, scratch.out, size.padded, size.padded_dim);
  for (int64_t lane = 0; lane < size.lanes; ++lane) {
    int64_t token = block.first + lane / shape.group, head = kv_head * shape.group + lane % shape.group;
    float sum = scratch.sum[lane];
    store_row(scratch.out_rows + lane * size.padded_dim, shape.dim, 1.0f / sum, tensors.out.at(token, head));
    tensors.lse[token * shape.heads + head] = scratch.max[lane] * scale + __builtin_logf(sum);
  }
}

template <class T>
int64_t forward_scratch(const AttentionShape& shape) {
  return ForwardScratch<typename Operand<T>::Element>(shape, nullptr).size;
}
