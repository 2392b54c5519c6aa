// Blocks of queries and keys in scratch memory, in the layouts that attention_kernels.h explains, and which keys a
// vector of queries sees.

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

// Rows of one head are too far apart for the processor to guess that they are wanted in turn; asking for them a little
// ahead, whether they exist or not, is 4 % of the time.
constexpr int64_t PREFETCH_TOKENS = 16;

template <class T>
INLINE void prefetch_row(Heads<T> of, int64_t token, int64_t head, int64_t dim) {
  constexpr int64_t LINE = 64 / sizeof(T);
  for (int64_t e = 0; e < dim; e += LINE) __builtin_prefetch(of.at(token + PREFETCH_TOKENS, head) + e);
}

// The row, followed by zeros up to padded_dim.
template <class T, class Element>
INLINE void load_row(const T* from, int64_t dim, int64_t padded_dim, Element* to) {
  int64_t i = 0;
  for (; i + LANES <= dim; i += LANES) store(to + i, load(from + i));
  for (; i < padded_dim; i += LANES) store(to + i, i < dim ? load(from + i, dim - i) : F32{});
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

template <class Element>
INLINE void fill_with_zeros(Element* to, int64_t count) {
  __builtin_memset(to, 0, count * sizeof(Element));
}

// E as it is stored: whole vectors of 32 bits a lane.
template <class Element>
INLINE int64_t padded_dim_of(const AttentionShape& shape) {
  return round_up(shape.dim, LANES * TERMS<Element>);
}

// Sizes of a block of queries; `lanes` without and `padded` with the lanes that fill the last vector.
struct BlockSize {
  int64_t lanes, padded, dim, padded_dim;
};

template <class Element>
INLINE BlockSize block_size(const AttentionShape& shape, const QueryBlock& block) {
  int64_t lanes = (block.last - block.first) * shape.group;
  return {lanes, round_up(lanes, LANES), shape.dim, padded_dim_of<Element>(shape)};
}

template <class T, class Element>
INLINE void load_queries(Heads<const T> from, const AttentionShape& shape, const QueryBlock& block, int64_t kv_head,
                         Element* rows) {
  BlockSize size = block_size<Element>(shape, block);
  for (int64_t token = block.first; token < block.last; ++token) {
    for (int64_t g = 0; g < shape.group; ++g, rows += size.padded_dim) {
      prefetch_row(from, token, kv_head * shape.group + g, shape.dim);
      load_row(from.at(token, kv_head * shape.group + g), shape.dim, size.padded_dim, rows);
    }
  }
  fill_with_zeros(rows, (size.padded - size.lanes) * size.padded_dim);
}

// Where in memory a document has the key of this number.
INLINE int64_t row_of_key(const AttentionShape& shape, const QueryBlock& block, int64_t key) {
  return key < block.own_key ? key - block.own_key + shape.shared : key;
}

template <class T, class Element>
INLINE void load_keys(Heads<const T> from, const AttentionShape& shape, const QueryBlock& block, int64_t first,
                      int64_t last, int64_t kv_head, Element* rows) {
  int64_t padded_dim = padded_dim_of<Element>(shape);
  for (int64_t key = first; key < last; ++key, rows += padded_dim) {
    int64_t row = row_of_key(shape, block, key);
    prefetch_row(from, row, kv_head, shape.dim);
    load_row(from.at(row, kv_head), shape.dim, padded_dim, rows);
  }
  fill_with_zeros(rows, (round_up(last - first, TILE_ROWS) - (last - first)) * padded_dim);
}

// rows (lanes, width) to panels of (width, lanes), or back.
template <bool TO_PANELS>
INLINE void transpose_block(float* rows, float* panels, int64_t lanes, int64_t width) {
  for (int64_t lane = 0, vectors; lane < lanes; lane += vectors * LANES) {
    vectors = next_vectors((lanes - lane) / LANES);
    float* panel = panels + lane * width;
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t e = 0; e < width; e += LANES) {
        F32 square[LANES];
        float *row = rows + (lane + v * LANES) * width + e, *column = panel + (e * vectors + v) * LANES;
        float *from = TO_PANELS ? row : column, *to = TO_PANELS ? column : row;
        int64_t from_stride = TO_PANELS ? width : vectors * LANES, to_stride = TO_PANELS ? vectors * LANES : width;
        for (int i = 0; i < LANES; ++i) square[i] = load(from + i * from_stride);
        transpose(square);
        for (int i = 0; i < LANES; ++i) store(to + i * to_stride, square[i]);
      }
    }
  }
}

// Queries as rows (lanes, E) to panels (E / TERMS, lanes, TERMS).
template <class Element>
INLINE void to_panels(Element* rows, Element* panels, const BlockSize& size) {
  transpose_block<true>((float*)rows, (float*)panels, size.padded, size.padded_dim / TERMS<Element>);
}

// Rows (count, E) to (count / TERMS, E, TERMS), for sums over the rows. For one term these are the same memory.
INLINE void pair_rows(const float*, int64_t, int64_t, float*) {}
INLINE void pair_rows(const Bf16* rows, int64_t count, int64_t padded_dim, Bf16* to) {
  for (int64_t i = 0; i < count; i += 2, rows += 2 * padded_dim, to += 2 * padded_dim) {
    for (int64_t e = 0; e < padded_dim; e += LANES) {
      store_terms(to + 2 * e, {load(rows + e), load(rows + padded_dim + e)});
    }
  }
}

// The last key that each lane sees, counted from `base`. A lane of padding sees what the last lane sees.
INLINE void last_keys(const AttentionShape& shape, const QueryBlock& block, int64_t base, float* last) {
  int64_t tokens = block.last - block.first, lanes = tokens * shape.group, own = block.first + block.shift - base;
  for (int64_t t = 0; t < tokens; ++t) fill(last + t * shape.group, shape.group, float(own + t));
  fill(last + lanes, round_up(lanes, LANES) - lanes, float(own + tokens - 1));
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

  template <class Element = float>
  Element* take(int64_t count) {
    float* taken = next + size;
    size += round_up(count / TERMS<Element>, 16);
    return (Element*)taken;
  }

  // Where pair_rows puts `count` elements of these rows.
  float* take_pairs(float* rows, int64_t) { return rows; }
  Bf16* take_pairs(Bf16*, int64_t count) { return take<Bf16>(count); }
};

INLINE int64_t most_lanes(const AttentionShape& shape) {
  return round_up(shape.group > ATTENTION_LANES ? shape.group : ATTENTION_LANES, LANES);
}
