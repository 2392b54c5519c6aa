// A few tokens times an NF4 matrix, of which every byte is read once and no dequantised copy is made.
//
// One or two tokens, or fp32: a warp takes four features, a lane 32 of their weights at a time, 16 bytes of codes each;
// what it has read of x serves all four. The codes of a chunk are summed up before they are scaled. At 3 TB/s a
// multiprocessor of an H100 gets the codes of 26 weights a cycle; it can look up 32.
//
// More tokens, 16-bit types: a warp dequantises 32 features x 32 weights into shared memory and multiplies them on the
// tensor cores with 16 tokens, while the codes of its next tile are on their way. The warps of a block share its
// features and take turns along `in`, so that few features still fill the GPU; their sums are added in order.

#include "nf4_gemv_kernels.h"

#include "elements.h"
#include "launch.h"
#include "nf4_tables.h"
#include "reduce.h"

#include <mma.h>

namespace minift::cuda {
namespace {

constexpr int CHUNK = 32;  // weights of one feature that a lane takes at once; they share a scale

struct alignas(16) Codes {
  uint32_t words[CHUNK / 8];  // the codes of eight weights each, the first in the lowest byte
};

// Whether the codes of every chunk may be read at once.
bool aligned_chunks(const uint8_t* codes) { return reinterpret_cast<uintptr_t>(codes) % alignof(Codes) == 0; }

__device__ __forceinline__ Codes load_codes(const uint8_t* from, bool vector) {
  if (vector) return *reinterpret_cast<const Codes*>(from);
  Codes codes;
#pragma unroll
  for (int i = 0; i < CHUNK / 8; ++i) {
    codes.words[i] = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) codes.words[i] |= uint32_t{from[4 * i + k]} << (8 * k);
  }
  return codes;
}

// The codebook's value of weight k of eight.
__device__ __forceinline__ float value_of(const float (&codebook)[16], uint32_t word, int k) {
  return codebook[word >> (4 * (k ^ 1)) & 15];
}

// ---- one or two tokens ----

constexpr int GEMV_THREADS = 128, GEMV_FEATURES = 4;

template <class T, int TOKENS>
__global__ void __launch_bounds__(GEMV_THREADS)
    gemv(Rows<const T> x, int64_t first_token, const uint8_t* codes, nf4::Scales scales, int block_size_log2,
         int64_t features, bool aligned_codes, bool vector, const __grid_constant__ Table table, T* y) {
  __shared__ float codebook[16];
  fill(codebook, table);
  int lane = threadIdx.x % WARP;
  int64_t warp = (int64_t{blockIdx.x} * GEMV_THREADS + threadIdx.x) / WARP;
  int64_t num_warps = int64_t{gridDim.x} * GEMV_THREADS / WARP;
  const T* tokens[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) tokens[t] = x[first_token + t];

  for (int64_t feature = warp * GEMV_FEATURES; feature < features; feature += num_warps * GEMV_FEATURES) {
    float sums[GEMV_FEATURES][TOKENS] = {};
    for (int64_t at = lane * CHUNK; at < x.width; at += WARP * CHUNK) {
      Codes of[GEMV_FEATURES];
      float scale[GEMV_FEATURES], partial[GEMV_FEATURES][TOKENS] = {};
#pragma unroll
      for (int f = 0; f < GEMV_FEATURES; ++f) {
        int64_t element = min(feature + f, features - 1) * x.width + at;  // what is too many is computed and dropped
        of[f] = load_codes(codes + element / 2, aligned_codes);
        scale[f] = scales[element >> block_size_log2];
      }
#pragma unroll
      for (int i = 0; i < CHUNK / PACK; ++i) {
        Pack of_x[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) of_x[t] = load_pack(tokens[t] + at + i * PACK, PACK, vector);
#pragma unroll
        for (int f = 0; f < GEMV_FEATURES; ++f) {
#pragma unroll
          for (int k = 0; k < PACK; ++k) {
            float value = value_of(codebook, of[f].words[i], k);
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) partial[f][t] += value * of_x[t].at[k];
          }
        }
      }
#pragma unroll
      for (int f = 0; f < GEMV_FEATURES; ++f) {
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) sums[f][t] += scale[f] * partial[f][t];
      }
    }
#pragma unroll
    for (int f = 0; f < GEMV_FEATURES; ++f) {
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        float sum = reduce_warp<Sum>(sums[f][t]);
        if (lane == 0 && feature + f < features) y[(first_token + t) * features + feature + f] = from_float<T>(sum);
      }
    }
  }
}

template <class T>
void launch_gemv(Rows<const T> x, const uint8_t* codes, nf4::Scales scales, int block_size_log2, int64_t features,
                 T* y, cudaStream_t stream) {
  unsigned blocks = blocks_for(features, GEMV_FEATURES * GEMV_THREADS / WARP);
  for (int64_t token = 0; token < x.count;) {
    bool two = x.count - token >= 2;
    launch("nf4_gemv", two ? gemv<T, 2> : gemv<T, 1>, blocks, GEMV_THREADS, stream, x, token, codes, scales,
           block_size_log2, features, aligned_chunks(codes), aligned(x), Table(nf4::CODEBOOK), y);
    token += two ? 2 : 1;
  }
}

// ---- up to 16 tokens on the tensor cores ----

constexpr int GEMM_WARPS = 8, GEMM_THREADS = GEMM_WARPS * WARP, TILE = 16, GEMM_FEATURES = 2 * TILE;
constexpr int STRIDE = CHUNK + 16;  // of rows in shared memory: a multiple of 32 bytes, and not of all banks

// What the tensor cores call these types.
__device__ __forceinline__ const __nv_bfloat16* native(const Bf16* of) {
  return reinterpret_cast<const __nv_bfloat16*>(of);
}
__device__ __forceinline__ const __half* native(const Fp16* of) { return reinterpret_cast<const __half*>(of); }

template <class T>
struct alignas(32) WarpTiles {
  T weights[GEMM_FEATURES * STRIDE], tokens[TILE * STRIDE];
};

template <class T>
union GemmMemory {
  WarpTiles<T> tiles[GEMM_WARPS];
  alignas(32) float sums[GEMM_WARPS][TILE * GEMM_FEATURES];
};

template <class T>
__global__ void __launch_bounds__(GEMM_THREADS)
    gemm(Rows<const T> x, int64_t first_token, const uint8_t* codes, nf4::Scales scales, int block_size_log2,
         int64_t features, bool aligned_codes, bool vector, const __grid_constant__ Table table, T* y) {
  namespace wmma = nvcuda::wmma;
  using Native = std::remove_const_t<std::remove_pointer_t<decltype(native(static_cast<const T*>(nullptr)))>>;
  __shared__ float codebook[16];
  __shared__ GemmMemory<T> memory;
  fill(codebook, table);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  WarpTiles<T>& mine = memory.tiles[warp];
  int64_t count = min(x.count - first_token, int64_t{TILE}), chunks = x.width / CHUNK;

  for (int64_t feature = int64_t{blockIdx.x} * GEMM_FEATURES; feature < features;
       feature += int64_t{gridDim.x} * GEMM_FEATURES) {
    wmma::fragment<wmma::accumulator, TILE, TILE, TILE, float> sums[2];
    wmma::fill_fragment(sums[0], 0.0f);
    wmma::fill_fragment(sums[1], 0.0f);
    // A lane dequantises one feature; of one that does not exist, the last again, which is dropped at the end.
    int64_t row = min(feature + lane, features - 1) * x.width;
    Codes next{};
    float next_scale = 0;
    if (warp < chunks) {
      next = load_codes(codes + (row + warp * CHUNK) / 2, aligned_codes);
      next_scale = scales[(row + warp * CHUNK) >> block_size_log2];
    }
    for (int64_t chunk = warp; chunk < chunks; chunk += GEMM_WARPS) {
      Codes now = next;
      float scale = next_scale;
      if (int64_t element = row + (chunk + GEMM_WARPS) * CHUNK; chunk + GEMM_WARPS < chunks) {
        next = load_codes(codes + element / 2, aligned_codes);
        next_scale = scales[element >> block_size_log2];
      }
      __syncwarp();  // the last tile has been multiplied
#pragma unroll
      for (int i = 0; i < CHUNK / PACK; ++i) {
        Pack pack;
#pragma unroll
        for (int k = 0; k < PACK; ++k) pack.at[k] = __fmul_rn(value_of(codebook, now.words[i], k), scale);
        store_shared(mine.weights + lane * STRIDE + i * PACK, from_floats<T>(pack));
      }
#pragma unroll
      for (int i = 0; i < TILE * CHUNK / PACK / WARP; ++i) {
        int token = (lane + i * WARP) / (CHUNK / PACK), column = (lane + i * WARP) % (CHUNK / PACK) * PACK;
        Pack pack = load_pack(x[first_token + min(int64_t{token}, count - 1)] + chunk * CHUNK + column, PACK, vector);
        store_shared(mine.tokens + token * STRIDE + column, from_floats<T>(pack));
      }
      __syncwarp();
#pragma unroll
      for (int k = 0; k < CHUNK; k += TILE) {
        wmma::fragment<wmma::matrix_a, TILE, TILE, TILE, Native, wmma::row_major> of_tokens;
        wmma::load_matrix_sync(of_tokens, native(mine.tokens + k), STRIDE);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          wmma::fragment<wmma::matrix_b, TILE, TILE, TILE, Native, wmma::col_major> of_weights;
          wmma::load_matrix_sync(of_weights, native(mine.weights + half * TILE * STRIDE + k), STRIDE);
          wmma::mma_sync(sums[half], of_tokens, of_weights, sums[half]);
        }
      }
    }
    __syncthreads();  // tiles end, sums begin
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      wmma::store_matrix_sync(memory.sums[warp] + half * TILE, sums[half], GEMM_FEATURES, wmma::mem_row_major);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < TILE * GEMM_FEATURES; i += GEMM_THREADS) {
      int token = i / GEMM_FEATURES, column = i % GEMM_FEATURES;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < GEMM_WARPS; ++w) sum += memory.sums[w][i];
      if (token < count && feature + column < features) {
        y[(first_token + token) * features + feature + column] = from_float<T>(sum);
      }
    }
    __syncthreads();
  }
}

}  // namespace

template <class T>
void nf4_gemv(Rows<const T> x, const uint8_t* codes, nf4::Scales scales, int64_t block_size, int64_t features, T* y,
              cudaStream_t stream) {
  int block_size_log2 = log2_of(block_size);
  if (sizeof(T) == sizeof(float) || x.count <= 2) {
    launch_gemv(x, codes, scales, block_size_log2, features, y, stream);
    return;
  }
  if constexpr (sizeof(T) < sizeof(float)) {
    for (int64_t token = 0; token < x.count; token += TILE) {
      launch("nf4_gemv", gemm<T>, blocks_for(features, GEMM_FEATURES), GEMM_THREADS, stream, x, token, codes, scales,
             block_size_log2, features, aligned_chunks(codes), aligned(x), Table(nf4::CODEBOOK), y);
    }
  }
}

#define INSTANTIATE(T) \
  template void nf4_gemv(Rows<const T>, const uint8_t*, nf4::Scales, int64_t, int64_t, T*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(Bf16)
INSTANTIATE(Fp16)

}  // namespace minift::cuda
