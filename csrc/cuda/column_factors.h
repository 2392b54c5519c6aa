// Factors (W, R) in shared memory, as the tensor cores take them to make rows of a wide matrix: narrow F^T.

#pragma once

#include "low_rank_work.h"
#include "tensor_cores.h"

namespace minift::cuda::low_rank {

constexpr int ROWS = 128;  // tokens of a block

// A warp makes 64 columns of 8 tokens at a time: lane 4 g + q of them columns 8 g .. 8 g + 7 of tokens 2 q and 2 q + 1,
// so that a row is moved in whole lines of the cache. These come from four products of the factor, on the left, and the
// tokens: rows g and g + 8 in product j are columns 8 g + j and 8 g + 4 + j.
struct ColumnFactors {
  static constexpr int COLUMNS = 64, TOKENS = 8, FOURS = COLUMNS * TILE / QUAD;
  static constexpr int MOST_FOURS = GROUP * CHUNK * TILE / QUAD;  // of a block, in shared memory

  // Of ranks 4 q .. 4 q + 3 of a column. A lane finds those of its two columns of product j in one access.
  __device__ static int place(int q, int column) {
    int g = column % COLUMNS / PACK, j = column % 4, upper = column % PACK / 4;
    return column / COLUMNS * FOURS + j * (FOURS / 4) + (4 * g + q) * 2 + upper;
  }

  // `columns` of each of the tiles from `first` on, after which the wide matrix has `left`.
  template <bool VECTOR>
  __device__ static __forceinline__ void load(const RankTile* tiles, int num_tiles, int64_t first, int columns,
                                              int left, Four* shared) {
    int jobs = columns * TILE / (4 * PACK);  // of a tile
    for (int job = threadIdx.x; job < num_tiles * jobs; job += THREADS) {
      const RankTile& tile = tiles[job / jobs];
      int i = job % jobs;
      Four* to = shared + job / jobs * columns * TILE / QUAD;
      Eight lines[4];
      if (tile.ranks_adjacent) {
        int rank = i % 2 * PACK, column = i / 2 * QUAD;
        const Bf16* from = tile.factor + (first + column) * tile.factor_stride + rank;
        load_lines<VECTOR>(lines, from, tile.factor_stride, left - column, tile.ranks - rank);
#pragma unroll
        for (int k = 0; k < PACK; ++k) to[place(rank / QUAD + k % 2, column + k / 2)] = half_of(lines[k / 2], k % 2);
      } else {
        int rank = i % 4 * QUAD, column = i / 4 * PACK;
        const Bf16* from = tile.factor + rank * tile.factor_stride + first + column;
        load_lines<VECTOR>(lines, from, tile.factor_stride, tile.ranks - rank, left - column);
#pragma unroll
        for (int k = 0; k < PACK; ++k) to[place(rank / QUAD, column + k)] = across(lines, k);
      }
    }
  }

  // Where `sums` has column 8 g + k of token 2 q + r.
  __device__ static __forceinline__ float& sum(float (&sums)[4][4], int r, int k) {
    return sums[k % 4][r + k / 4 * 2];
  }

  // Adds a tile's products of 64 columns. narrow: of token g; `tile` is where the columns are in shared memory.
  __device__ static __forceinline__ void add(float (&sums)[4][4], const Four& narrow, const Four* tile) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      auto factors = *reinterpret_cast<const Eight*>(tile + j * (FOURS / 4) + 2 * (threadIdx.x % WARP));
      multiply(sums[j], half_of(factors, 0), half_of(factors, 1), narrow);
    }
  }
};

// Ranks 4 q .. 4 q + 3 of a row's narrow matrix, zeros where `is_row` says that there is no such row.
template <bool VECTOR>
__device__ __forceinline__ Four load_narrow(const RankTile& tile, int64_t row, bool is_row) {
  int first = threadIdx.x % 4 * QUAD;
  return load_up_to<VECTOR, QUAD>(tile.narrow + row * tile.narrow_stride + first, is_row ? tile.ranks - first : 0);
}

}  // namespace minift::cuda::low_rank
