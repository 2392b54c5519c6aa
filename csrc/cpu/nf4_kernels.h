// NF4 blocks [begin, end), all of them complete; see nf4.h for the format. block_size is a multiple of 2 * LANES.

// The largest magnitude as an fp32. Compared as bits, where infinity is larger than every number and a NaN than that.
template <class T>
float largest_magnitude(const T* block, int64_t block_size) {
  I32 largest = {};
  for (int64_t i = 0; i < block_size; i += LANES) {
    I32 magnitude = bit_cast<I32>(load(block + i)) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  int32_t bits = 0;
  for (int i = 0; i < LANES; ++i) bits = largest[i] > bits ? largest[i] : bits;
  return __builtin_bit_cast(float, bits);
}

template <class T>
void nf4_absmax(const T* weight, int64_t block_size, float* absmax, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    absmax[block] = largest_magnitude(weight + block * block_size, block_size);
  }
}

// The number of thresholds below each element, by bisection.
static inline __attribute__((always_inline)) U32 nf4_codes(F32 v, const Table& thresholds) {
  U32 code = bit_cast<U32>(v > nf4::THRESHOLDS[7]) & 8;
  code |= bit_cast<U32>(v > lookup(thresholds, code + 3)) & 4;
  code |= bit_cast<U32>(v > lookup(thresholds, code + 1)) & 2;
  code |= bit_cast<U32>(v > lookup(thresholds, code)) & 1;
  return code;
}

template <class T>
void nf4_quantize(const T* weight, int64_t block_size, uint8_t* codes, float* absmax, int64_t begin, int64_t end) {
  float padded[16] = {};
  __builtin_memcpy(padded, nf4::THRESHOLDS, sizeof nf4::THRESHOLDS);
  Table thresholds = load_table(padded);
  for (int64_t block = begin; block < end; ++block) {
    const T* elements = weight + block * block_size;
    float scale = largest_magnitude(elements, block_size);
    absmax[block] = scale;
    float inverse = 1.0f / (scale > nf4::SMALLEST_DIVISOR ? scale : nf4::SMALLEST_DIVISOR);
    for (int64_t i = 0; i < block_size; i += 2 * LANES) {
      Pairs pairs = load_pairs(elements + i);
      U32 even = nf4_codes(pairs.even * inverse, thresholds), odd = nf4_codes(pairs.odd * inverse, thresholds);
      store_bytes(codes + (block * block_size + i) / 2, even << 4 | odd);
    }
  }
}

// 2 * LANES elements out of LANES bytes.
static inline __attribute__((always_inline)) void nf4_expand(const uint8_t* codes, const Table& values, float* out) {
  U32 bytes = load_bytes(codes);
  store_pairs(out, {lookup(values, bytes >> 4), lookup(values, bytes)});
}

template <class T>
static inline __attribute__((always_inline)) void nf4_expand(const uint8_t* codes, const HalfTable& values, T* out) {
  U32 bytes = load_bytes(codes);
  U32 elements = lookup(values, bytes >> 4 | bytes << 16);
  __builtin_memcpy(out, &elements, sizeof elements);
}

static inline __attribute__((always_inline)) Table nf4_values(const Table& products, float*) { return products; }
template <class T>
static inline __attribute__((always_inline)) HalfTable nf4_values(const Table& products, T*) {
  return half_table(products, (T*)nullptr);
}

// Writes blocks [begin, end) to `out`, which starts with block `begin`. Only 16 different numbers occur in a block, so
// only 16 are multiplied and rounded.
template <class T>
void nf4_dequantize(const uint8_t* codes, nf4::Scales scales, int64_t block_size, T* out, int64_t begin, int64_t end) {
  Table codebook = load_table(nf4::CODEBOOK);
  for (int64_t block = begin; block < end; ++block) {
    auto values = nf4_values(codebook * scales[block], (T*)nullptr);
    const uint8_t* from = codes + block * block_size / 2;
    T* to = out + (block - begin) * block_size;
    for (int64_t i = 0; i < block_size; i += 2 * LANES) nf4_expand(from + i / 2, values, to + i);
  }
}
