// A block of queries attends to its keys; see attention_kernels.h.

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

inline int64_t forward_scratch(const AttentionShape& shape) { return ForwardScratch(shape, nullptr).size; }
