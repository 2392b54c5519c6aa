// What the low-rank kernels share: products of tiles on the tensor cores, how tiles get into shared memory, and how the
// terms of an op become the work of blocks.
//
// A block has ROWS tokens and takes COLUMNS of a wide matrix at a time, with up to GROUP tiles of TILE ranks each. Its
// threads load the next tiles into registers while its warps multiply those in shared memory.

#pragma once

#include "elements.h"
#include "launch.h"
#include "low_rank_kernels.h"

#include <mma.h>

namespace minift::cuda::low_rank {

namespace wmma = nvcuda::wmma;

constexpr int THREADS = 256;
constexpr int TILE = RANK_TILE, GROUP = 4;
constexpr int ROWS = 64, COLUMNS = 128;
constexpr int STRIDE = COLUMNS + TILE;  // of rows in shared memory: a multiple of 32 bytes, and not of all banks

using RowsOfA = wmma::fragment<wmma::matrix_a, TILE, TILE, TILE, __nv_bfloat16, wmma::row_major>;
using ColumnsOfA = wmma::fragment<wmma::matrix_a, TILE, TILE, TILE, __nv_bfloat16, wmma::col_major>;
using RowsOfB = wmma::fragment<wmma::matrix_b, TILE, TILE, TILE, __nv_bfloat16, wmma::row_major>;
using ColumnsOfB = wmma::fragment<wmma::matrix_b, TILE, TILE, TILE, __nv_bfloat16, wmma::col_major>;
using Accumulator = wmma::fragment<wmma::accumulator, TILE, TILE, TILE, float>;

// sum += a b, with b in shared memory.
template <class FragmentOfB, class FragmentOfA>
__device__ __forceinline__ void multiply(Accumulator& sum, const FragmentOfA& a, const Bf16* b, unsigned stride) {
  FragmentOfB of_b;
  wmma::load_matrix_sync(of_b, reinterpret_cast<const __nv_bfloat16*>(b), stride);
  wmma::mma_sync(sum, a, of_b, sum);
}

template <class FragmentOfA>
__device__ __forceinline__ FragmentOfA load_a(const Bf16* a, unsigned stride) {
  FragmentOfA of_a;
  wmma::load_matrix_sync(of_a, reinterpret_cast<const __nv_bfloat16*>(a), stride);
  return of_a;
}

// Up to TILE ranks of a term.
struct RankTile {
  Bf16* narrow;
  const Bf16* factor;
  int64_t narrow_stride, factor_stride;
  float scale;
  int ranks;
  bool ranks_adjacent;
};

// Tiles that share a wide matrix.
struct Group {
  Wide wide;
  int first_tile, num_tiles;
  const Bf16* bias;  // of from_rank; may be null
};

// An argument of a kernel, which is at most 4 KB.
struct Work {
  static constexpr int MOST_TILES = 48, MOST_GROUPS = 32;

  RankTile tiles[MOST_TILES];
  Group groups[MOST_GROUPS];
  int num_tiles, num_groups;
  int64_t tokens;
  // Of to_rank. sums: for each split as many as there are elements in `narrow`; null if there is one split.
  int64_t splits, columns_of_split, split_stride;
  float* sums;
  const Bf16* narrow;
};
static_assert(sizeof(Work) <= 3900);

// VECTOR: there are a whole pack, or none; and packs are aligned.
template <bool VECTOR>
__device__ __forceinline__ PackOf<Bf16> load_up_to(const Bf16* from, int64_t count) {
  if (VECTOR && count <= 0) return PackOf<Bf16>{};
  return load_elements<VECTOR>(from, VECTOR ? PACK : count);
}

// ROWS x COLUMNS of a wide matrix, zeros beyond its end. In shared memory: rows of STRIDE.
template <bool VECTOR>
struct WideTile {
  static constexpr int PACKS = ROWS * COLUMNS / PACK / THREADS;
  PackOf<Bf16> packs[PACKS];

  __device__ static int row(int i) { return (threadIdx.x + i * THREADS) / (COLUMNS / PACK); }
  __device__ static int column() { return threadIdx.x % (COLUMNS / PACK) * PACK; }

  __device__ __forceinline__ void load(const Wide& wide, int64_t first_row, int64_t end_row, int64_t first_column) {
    const Bf16* from = wide.data + (first_row + row(0)) * wide.stride + first_column + column();
    int64_t left = wide.width - first_column - column();
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
      packs[i] = load_up_to<VECTOR>(from, first_row + row(i) < end_row ? left : 0);
      from += (THREADS / (COLUMNS / PACK)) * wide.stride;
    }
  }
  __device__ __forceinline__ void store(Bf16* shared) const {
#pragma unroll
    for (int i = 0; i < PACKS; ++i) store_shared(shared + row(i) * STRIDE + column(), packs[i]);
  }
};

// COLUMNS x TILE of the factors of a group. In shared memory TILE * STRIDE for each: rows of TILE ranks if they are
// adjacent in the factor, else rows of STRIDE.
template <bool VECTOR>
struct FactorTiles {
  static_assert(COLUMNS * TILE / PACK == THREADS);
  PackOf<Bf16> packs[GROUP];

  __device__ __forceinline__ void load(const RankTile* tiles, int count, int64_t width, int64_t first) {
#pragma unroll
    for (int t = 0; t < GROUP; ++t) {
      if (t >= count) continue;
      const RankTile& tile = tiles[t];
      if (tile.ranks_adjacent) {
        int64_t at = first + threadIdx.x / 2, rank = threadIdx.x % 2 * PACK;
        packs[t] = load_up_to<VECTOR>(tile.factor + at * tile.factor_stride + rank, at < width ? tile.ranks - rank : 0);
      } else {
        int64_t at = first + threadIdx.x % TILE * PACK, rank = threadIdx.x / TILE;
        packs[t] = load_up_to<VECTOR>(tile.factor + rank * tile.factor_stride + at, rank < tile.ranks ? width - at : 0);
      }
    }
  }
  __device__ __forceinline__ void store(const RankTile* tiles, int count, Bf16 (*shared)[TILE * STRIDE]) const {
#pragma unroll
    for (int t = 0; t < GROUP; ++t) {
      if (t >= count) continue;
      int at = tiles[t].ranks_adjacent ? threadIdx.x * PACK
                                       : threadIdx.x / TILE * STRIDE + threadIdx.x % TILE * PACK;
      store_shared(shared[t] + at, packs[t]);
    }
  }
};

// ROWS x TILE of the narrow matrices of a group. In shared memory: rows of TILE.
template <bool VECTOR>
struct NarrowTiles {
  static constexpr int PACKS = GROUP * ROWS * TILE / PACK / THREADS, OF_TILE = ROWS * TILE / PACK;
  PackOf<Bf16> packs[PACKS];

  template <class Tile>
  __device__ __forceinline__ void load(const Tile* tiles, int count, int64_t first_row, int64_t end_row) {
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
      int pack = threadIdx.x + i * THREADS, t = pack / OF_TILE;
      packs[i] = PackOf<Bf16>{};
      if (t >= count) continue;
      int64_t row = first_row + pack % OF_TILE / 2, rank = pack % 2 * PACK;
      packs[i] = load_up_to<VECTOR>(tiles[t].narrow + row * tiles[t].narrow_stride + rank,
                                    row < end_row ? tiles[t].ranks - rank : 0);
    }
  }
  __device__ __forceinline__ void store(Bf16 (*shared)[ROWS * TILE]) const {
#pragma unroll
    for (int i = 0; i < PACKS; ++i) {
      int pack = threadIdx.x + i * THREADS;
      store_shared(shared[pack / OF_TILE] + pack % OF_TILE * PACK, packs[i]);
    }
  }
};

// Whether every access to these rows can be a whole pack.
inline bool in_packs(const Bf16* data, int64_t stride, int64_t width) {
  return aligned(data) && stride % PACK == 0 && width % PACK == 0;
}

inline int64_t blocks_of(int64_t length, int64_t size) { return (length + size - 1) / size; }

}  // namespace minift::cuda::low_rank
