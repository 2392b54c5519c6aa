// The segmented low-rank product on the GPU: h = x Aᵀ in fp32 by one launch, y += h B by another.
//
// Made for generation, where a segment is a token and nothing but A and B is large: each of them is read once, by as
// many threads as there is work for (32 tokens of rank 16 and a 4096 x 4096 projection: 128 blocks of 256 threads read
// 4 MB of A, 256 blocks of 64 the same of B). Tokens of one segment share what is read, four at a time. A product's
// terms are added up in an order that depends on nothing but the width: a token has the same bits in every batch.
//
// Segments are an argument of the kernels, so the host neither copies them to the GPU nor waits for it.

#include "sgmv_kernels.h"

#include "elements.h"
#include "launch.h"
#include "reduce.h"

namespace minift::cuda {
namespace {

constexpr int TOKENS = 4, RANKS = 4;  // products of a block at a time
constexpr int SHRINK_THREADS = 256, EXPAND_THREADS = 64;
constexpr int MOST_SEGMENTS = 192;  // in one launch, whose arguments are at most 4 KB

// Up to TOKENS tokens of a segment.
struct Tile {
  int64_t token, first;
  int num_tokens, rank;
};

struct Tiles {
  SgmvSegment segments[MOST_SEGMENTS];
  int32_t first_tile[MOST_SEGMENTS];
  int32_t num_segments, num_tiles;

  __device__ __forceinline__ Tile operator[](int64_t tile) const {
    int low = 0, high = num_segments - 1;  // the last segment that begins with this tile or before
    while (low < high) {
      int middle = (low + high + 1) / 2;
      if (first_tile[middle] <= tile) low = middle;
      else high = middle - 1;
    }
    int token = segments[low].begin + static_cast<int>(tile - first_tile[low]) * TOKENS;
    int left = segments[low].end - token;
    return {token, segments[low].first, left < TOKENS ? left : TOKENS, segments[low].rank};
  }
};
static_assert(sizeof(Tiles) <= 3900);

// hidden[token][r]: a block has TOKENS times RANKS of them, its threads have the columns of x and A among themselves.
// VECTOR: rows of x and A are aligned and made of whole packs.
template <bool VECTOR, class T>
__global__ void __launch_bounds__(SHRINK_THREADS, 2)
    shrink(const __grid_constant__ Tiles tiles, int rank_tiles, Rows<const T> x, const T* A, float* hidden,
           int64_t hidden_stride) {
  constexpr int WARPS = SHRINK_THREADS / WARP, SUMS = TOKENS * RANKS;
  __shared__ float of_warps[WARPS][SUMS];
  for (int64_t item = blockIdx.x; item < int64_t{tiles.num_tiles} * rank_tiles; item += gridDim.x) {
    Tile tile = tiles[item / rank_tiles];
    int first_rank = static_cast<int>(item % rank_tiles) * RANKS;
    if (first_rank >= tile.rank) continue;
    // What is beyond the segment is its last row once more: no branch stands between loads.
    const T *factors[RANKS], *tokens[TOKENS];
#pragma unroll
    for (int r = 0; r < RANKS; ++r) factors[r] = A + (tile.first + min(first_rank + r, tile.rank - 1)) * x.width;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) tokens[t] = x[tile.token + min(t, tile.num_tokens - 1)];
    float sums[SUMS] = {};
    for (int64_t i = threadIdx.x * PACK; i < x.width; i += SHRINK_THREADS * PACK) {
      int64_t left = VECTOR ? PACK : x.width - i;
      PackOf<T> of_factors[RANKS];
#pragma unroll
      for (int r = 0; r < RANKS; ++r) of_factors[r] = load_elements<VECTOR>(factors[r] + i, left);
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        if (t >= tile.num_tokens) continue;
        Pack v = to_floats(load_elements<VECTOR>(tokens[t] + i, left));
#pragma unroll
        for (int r = 0; r < RANKS; ++r) {
          Pack a = to_floats(of_factors[r]);
#pragma unroll
          for (int k = 0; k < PACK; ++k) sums[t * RANKS + r] = __fmaf_rn(v.at[k], a.at[k], sums[t * RANKS + r]);
        }
      }
    }
    int lane = threadIdx.x % WARP;
    float of_warp = sum_warp_each(sums);
    __syncthreads();  // everybody has read the sums of the last item
    if (lane % (WARP / SUMS) == 0) of_warps[threadIdx.x / WARP][lane / (WARP / SUMS)] = of_warp;
    __syncthreads();
    int t = threadIdx.x / RANKS, r = threadIdx.x % RANKS;
    if (t < tile.num_tokens && first_rank + r < tile.rank) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < WARPS; ++warp) sum += of_warps[warp][threadIdx.x];
      hidden[(tile.token + t) * hidden_stride + first_rank + r] = sum;
    }
  }
}

// A thread has a pack of columns of y, for TOKENS tokens. VECTOR: rows of y and B are aligned and made of whole packs.
template <bool VECTOR, class T>
__global__ void __launch_bounds__(EXPAND_THREADS)
    expand(const __grid_constant__ Tiles tiles, int64_t column_tiles, const float* hidden, int64_t hidden_stride,
           const T* B, Rows<T> y) {
  for (int64_t item = blockIdx.x; item < tiles.num_tiles * column_tiles; item += gridDim.x) {
    Tile tile = tiles[item / column_tiles];
    int64_t column = (item % column_tiles * EXPAND_THREADS + threadIdx.x) * PACK, left = y.width - column;
    if (left <= 0) continue;
    if (VECTOR) left = PACK;
    Pack sums[TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      if (t < tile.num_tokens) sums[t] = to_floats(load_elements<VECTOR>(y[tile.token + t] + column, left));
    }
    const T* factor = B + tile.first * y.width + column;
    const float* h = hidden + tile.token * hidden_stride;
#pragma unroll 2
    for (int r = 0; r < tile.rank; ++r) {
      Pack b = to_floats(load_elements<VECTOR>(factor + r * y.width, left));
#pragma unroll
      for (int t = 0; t < TOKENS; ++t) {
        if (t >= tile.num_tokens) continue;
        float multiple = h[t * hidden_stride + r];
#pragma unroll
        for (int k = 0; k < PACK; ++k) sums[t].at[k] = __fmaf_rn(multiple, b.at[k], sums[t].at[k]);
      }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      if (t < tile.num_tokens) store_pack<VECTOR>(y[tile.token + t] + column, sums[t], left);
    }
  }
}

}  // namespace

template <class T>
void sgmv(Rows<const T> x, const T* A, const T* B, Rows<T> y, const SgmvSegment* segments, int64_t count,
          float* hidden, int64_t hidden_stride, cudaStream_t stream) {
  auto* shrink_kernel = aligned(x) && aligned(A) ? &shrink<true, T> : &shrink<false, T>;
  auto* expand_kernel = aligned(y) && aligned(B) ? &expand<true, T> : &expand<false, T>;
  int64_t column_tiles = (y.width + EXPAND_THREADS * PACK - 1) / (EXPAND_THREADS * PACK);
  for (int64_t done = 0; done < count; done += MOST_SEGMENTS) {
    Tiles tiles{};
    int rank_tiles = 0;
    for (; tiles.num_segments < std::min<int64_t>(MOST_SEGMENTS, count - done); ++tiles.num_segments) {
      const SgmvSegment& segment = segments[done + tiles.num_segments];
      tiles.segments[tiles.num_segments] = segment;
      tiles.first_tile[tiles.num_segments] = tiles.num_tiles;
      tiles.num_tiles += (segment.end - segment.begin + TOKENS - 1) / TOKENS;
      rank_tiles = std::max(rank_tiles, (segment.rank + RANKS - 1) / RANKS);
    }
    launch("sgmv_", shrink_kernel, blocks_for(int64_t{tiles.num_tiles} * rank_tiles, 1), SHRINK_THREADS, stream, tiles,
           rank_tiles, x, A, hidden, hidden_stride);
    launch("sgmv_", expand_kernel, blocks_for(tiles.num_tiles * column_tiles, 1), EXPAND_THREADS, stream, tiles,
           column_tiles, hidden, hidden_stride, B, y);
  }
}

#define INSTANTIATE(T)                                                                                           \
  template void sgmv(Rows<const T>, const T*, const T*, Rows<T>, const SgmvSegment*, int64_t, float*, int64_t,   \
                     cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(Bf16)
INSTANTIATE(Fp16)

}  // namespace minift::cuda
