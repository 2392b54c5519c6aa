// AdamW with 8-bit moments on the GPU, bound by memory: 16 bytes of an element (12 with a bf16 master), each of them
// once.
//
// A warp has a block of 256 elements, eight for each lane in two packs of four, from codes to codes in registers. The
// tables of both maps, 26 KB, are in shared memory, and a code is found by one look into them. That is four looks for
// an element, in random banks: 32 elements take about 14 cycles, while an H100's memory needs 35 to deliver them to a
// multiprocessor. (Bisection of 255 borders: twenty looks.)

#include "adamw_kernels.h"

#include "adamw_update.h"
#include "launch.h"
#include "reduce.h"

namespace minift::cuda {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int QUADS = BLOCK / (WARP * QUAD);  // of a lane
constexpr int BLOCKS_OF_WARP = 8;             // at least, where there are many: tables are worth their loads

template <bool SIGNED>
struct SharedMap {
  float values[DYNAMIC_VALUES];
  uint32_t buckets[Buckets<SIGNED>::COUNT];

  __device__ void fill(const DynamicMap& map) {
    for (int i = threadIdx.x; i < DYNAMIC_VALUES; i += THREADS) values[i] = __uint_as_float(map.values[i]);
    for (int i = threadIdx.x; i < int{Buckets<SIGNED>::COUNT}; i += THREADS) buckets[i] = map.buckets[i];
  }

  // The code of a value between -1 or 0 and 1.
  __device__ uint32_t code_of(float normed) const {
    using Map = Buckets<SIGNED>;
    uint32_t bits = __float_as_uint(normed) & 0x7fffffffu;
    bits = bits > Map::SMALLEST ? bits : Map::SMALLEST;
    bits = bits < Map::ONE ? bits : Map::ONE;  // a NaN must not look beyond the table
    bool negative = SIGNED && __float_as_uint(normed) >> 31 != 0;
    uint32_t entry = buckets[((bits - Map::SMALLEST) >> Map::LOW_BITS) + (negative ? Map::OF_ONE_SIGN : 0)];
    bool beyond = (bits & ((1u << Map::LOW_BITS) - 1)) > (entry & ((1u << Map::CODE_SHIFT) - 1));
    // One further away from zero: up, or below zero down.
    uint32_t code = (entry >> Map::CODE_SHIFT) + (beyond ? (negative ? ~0u : 1u) : 0u);
    return SIGNED || normed > 0.0f ? code : 0u;
  }
};

// Zeros from `count` on.
template <bool VECTOR, bool SIGNED>
__device__ __forceinline__ Quad dequantize(const uint8_t* codes, int64_t count, float absmax,
                                           const SharedMap<SIGNED>& map) {
  PackOf<uint8_t, QUAD> four = load_elements<VECTOR, QUAD>(codes, count);
  Quad moments;
#pragma unroll
  for (int k = 0; k < QUAD; ++k) moments.at[k] = k < count ? __fmul_rn(absmax, map.values[four.at(k)]) : 0.0f;
  return moments;
}

// Codes of a block and its absmax, which a NaN does not count for. All lanes together.
template <bool VECTOR, bool SIGNED>
__device__ __forceinline__ void quantize(const Quad (&moments)[QUADS], int64_t start, int64_t n,
                                         const SharedMap<SIGNED>& map, uint8_t* codes, float* absmax) {
  float largest = 0.0f;
#pragma unroll
  for (int q = 0; q < QUADS; ++q) {
#pragma unroll
    for (int k = 0; k < QUAD; ++k) largest = Max()(fabsf(moments[q].at[k]), largest);
  }
  largest = reduce_warp<Max>(largest);
  float inverse = largest >= 0x1p-126f ? __fdiv_rn(1.0f, largest) : 0.0f;  // that of a subnormal may be infinite
  if (threadIdx.x % WARP == 0) absmax[start / BLOCK] = largest;
#pragma unroll
  for (int q = 0; q < QUADS; ++q) {
    int64_t i = start + (q * WARP + threadIdx.x % WARP) * QUAD;
    PackOf<uint8_t, QUAD> four{};
#pragma unroll
    for (int k = 0; k < QUAD; ++k) four.set(k, map.code_of(__fmul_rn(moments[q].at[k], inverse)));
    store_elements<VECTOR>(codes + i, four, VECTOR ? QUAD : n - i);
  }
}

// The block of elements start to start + BLOCK, or to n. VECTOR: it is complete, and everything is aligned. One warp.
template <bool VECTOR, class T, bool IN_HALVES>
__device__ __forceinline__ void step_block(const AdamwStep& step, float factor, const QuantizedMoments& moments,
                                           const Weights<T, IN_HALVES>& weights, const SharedMap<true>& signed_map,
                                           const SharedMap<false>& unsigned_map, int64_t start, int64_t n) {
  float m_absmax = moments.exp_avg_absmax[start / BLOCK], v_absmax = moments.exp_avg_sq_absmax[start / BLOCK];
  Quad m[QUADS], v[QUADS];
#pragma unroll
  for (int q = 0; q < QUADS; ++q) {
    int64_t i = start + (q * WARP + threadIdx.x % WARP) * QUAD, count = VECTOR ? QUAD : n - i;
    m[q] = dequantize<VECTOR>(moments.exp_avg + i, count, m_absmax, signed_map);
    v[q] = dequantize<VECTOR>(moments.exp_avg_sq + i, count, v_absmax, unsigned_map);
    update_quad<VECTOR>(step, factor, weights, i, count, m[q], v[q]);
  }
  // All lanes have read the old absmax when the first one knows the new one.
  quantize<VECTOR>(m, start, n, signed_map, moments.exp_avg, moments.exp_avg_absmax);
  quantize<VECTOR>(v, start, n, unsigned_map, moments.exp_avg_sq, moments.exp_avg_sq_absmax);
}

template <class T, bool IN_HALVES>
__global__ void __launch_bounds__(THREADS)
    adamw_8bit_kernel(const __grid_constant__ AdamwStep step, const __grid_constant__ QuantizedMoments moments,
                      Weights<T, IN_HALVES> weights, int64_t n, bool vector) {
  float factor = step.factor();
  if (!is_finite(factor)) return;
  __shared__ SharedMap<true> signed_map;
  __shared__ SharedMap<false> unsigned_map;
  signed_map.fill(moments.signed_map);
  unsigned_map.fill(moments.unsigned_map);
  __syncthreads();
  int64_t stride = int64_t{gridDim.x} * WARPS * BLOCK;
  for (int64_t start = (int64_t{blockIdx.x} * WARPS + threadIdx.x / WARP) * BLOCK; start < n; start += stride) {
    if (vector && n - start >= BLOCK) {
      step_block<true>(step, factor, moments, weights, signed_map, unsigned_map, start, n);
    } else {
      step_block<false>(step, factor, moments, weights, signed_map, unsigned_map, start, n);
    }
  }
}

}  // namespace

template <class T, bool IN_HALVES>
void adamw_8bit(const AdamwStep& step, const QuantizedMoments& moments, Weights<T, IN_HALVES> weights, int64_t n,
                cudaStream_t stream) {
  bool vector = aligned(weights) && aligned<QUAD>(moments.exp_avg) && aligned<QUAD>(moments.exp_avg_sq);
  launch("adamw_8bit", adamw_8bit_kernel<T, IN_HALVES>, blocks_for(n, BLOCK * WARPS * BLOCKS_OF_WARP), THREADS, stream,
         step, moments, weights, n, vector);
}

#define INSTANTIATE(T, IN_HALVES) \
  template void adamw_8bit(const AdamwStep&, const QuantizedMoments&, Weights<T, IN_HALVES>, int64_t, cudaStream_t);
MINIFT_FOR_ALL_WEIGHTS(INSTANTIATE)

}  // namespace minift::cuda
