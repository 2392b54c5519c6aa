// wide = bias + the sum of narrow F^T on the tensor cores, for all of an op's terms in one launch.
//
// Bound by memory: each wide matrix is written once, 2 T W bytes, as cuBLAS does; what is won are launches, and what
// they copy (of a sum of three updates: two stacks and a product). Sums become bf16 and go to memory from where the
// tensor cores left them, in whole sectors. A warp waits for nothing but its small operands, so nothing is loaded
// ahead: a multiprocessor has many blocks instead, of which some always write. Each reads its factors, R / ROWS of the
// bytes that it writes, from the L2 cache.

#include "low_rank_work.h"
#include "tensor_cores.h"

namespace minift::cuda {
namespace {

using namespace low_rank;

constexpr int ROWS = WARPS * 16;  // tokens of a block: 16 for each warp

// Of from_rank: a warp writes 32 columns at a time, and lane 4 g + q of them 8 q .. 8 q + 7 of rows g and g + 8. These
// come from four products: column 4 g + j of the 32 is column g of the factor in product j, so sums 2 q and 2 q + 1 are
// those of columns 8 q + j and 8 q + 4 + j.
struct ColumnFactors {
  static constexpr int COLUMNS = 32, FOURS = COLUMNS * TILE / QUAD;
  static constexpr int MOST_FOURS = GROUP * CHUNK * TILE / QUAD;  // of a block, in shared memory

  // Of ranks 4 q .. 4 q + 3 of a column. A lane finds those of j = 0 and 1 in one access, and those of 2 and 3.
  __device__ static int place(int q, int column) {
    int g = column % COLUMNS / 4, j = column % 4;
    return column / COLUMNS * FOURS + j / 2 * (FOURS / 2) + (4 * g + q) * 2 + j % 2;
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
};

template <bool VECTOR>
__global__ void __launch_bounds__(THREADS, VECTOR ? 4 : 1) from_rank_kernel(const __grid_constant__ Work work) {
  constexpr int COLUMNS = ColumnFactors::COLUMNS;
  alignas(16) __shared__ Four shared[ColumnFactors::MOST_FOURS];
  int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4;
  int blocks = work.row_blocks * work.column_blocks, items = blocks * work.num_groups;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const Group& group = work.groups[item / blocks];
    const RankTile* tiles = work.tiles + group.first_tile;
    // Neighbours in the grid have neighbouring columns: rows of a wide matrix are written in order.
    int64_t first = int64_t{item % work.column_blocks} * work.columns_of_block, width = group.wide.width;
    int64_t row = int64_t{item % blocks / work.column_blocks} * ROWS + threadIdx.x / WARP * 16 + g;
    if (first >= width) continue;
    auto load_narrow = [&](const RankTile& tile, int r) {
      const Bf16* from = tile.narrow + (row + 8 * r) * tile.narrow_stride + q * QUAD;
      return load_up_to<VECTOR, QUAD>(from, row + 8 * r < work.tokens ? tile.ranks - q * QUAD : 0);
    };
    Four narrows[GROUP][2];
#pragma unroll
    for (int t = 0; t < GROUP; ++t) {
      if (t >= group.num_tiles) continue;
      for (int r = 0; r < 2; ++r) narrows[t][r] = load_narrow(tiles[t], r);
    }
    __syncthreads();  // what was here has been multiplied
    int columns = work.columns_of_block, columns_left = static_cast<int>(width - first);
    ColumnFactors::load<VECTOR>(tiles, group.num_tiles, first, columns, columns_left, shared);
    __syncthreads();
#pragma unroll 1
    for (int c = 0; c < min(columns, columns_left); c += COLUMNS) {
      int64_t column = first + c + q * PACK;
      int left = columns_left - c - q * PACK;
      Pack bias{};
      if (group.bias != nullptr && left > 0) bias = to_floats(load_elements<VECTOR>(group.bias + column, left));
      float sums[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        for (int i = 0; i < 4; ++i) sums[j][i] = bias.at[i % 2 * 4 + j];
      }
      __syncwarp();  // lanes that had nothing to store wait for the others
      auto add_tile = [&](int t, const Four& row_0, const Four& row_8) {
        const Four* from = shared + (t * columns + c) * (TILE / QUAD) + 2 * lane;
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          auto factors = *reinterpret_cast<const Eight*>(from + j / 2 * (ColumnFactors::FOURS / 2));
          for (int i = 0; i < 2; ++i) multiply(sums[j + i], row_0, row_8, half_of(factors, i));
        }
      };
#pragma unroll
      for (int t = 0; t < GROUP; ++t) {
        if (t < group.num_tiles) add_tile(t, narrows[t][0], narrows[t][1]);
      }
      for (int t = GROUP; t < group.num_tiles; ++t) add_tile(t, load_narrow(tiles[t], 0), load_narrow(tiles[t], 1));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (row + 8 * r >= work.tokens || left <= 0) continue;
        Pack pack;
#pragma unroll
        for (int k = 0; k < PACK; ++k) pack.at[k] = sums[k % 4][2 * r + k / 4];
        store_pack<VECTOR>(group.wide.data + (row + 8 * r) * group.wide.stride + column, pack, VECTOR ? PACK : left);
      }
    }
  }
}

}  // namespace

// A group is not cut: its wide matrix is written once. The more tiles it has, the fewer columns has a block.
void from_rank(const std::vector<LowRankGroup>& groups, int64_t tokens, cudaStream_t stream) {
  static_assert(FROM_RANK_TILES * ColumnFactors::FOURS == ColumnFactors::MOST_FOURS);
  auto* kernel = vectors(groups) ? &from_rank_kernel<true> : &from_rank_kernel<false>;
  for_each_work(groups, tokens, FROM_RANK_TILES, [&](Work& work) {
    int64_t widest = 0;
    int most_tiles = 0;
    for (int g = 0; g < work.num_groups; ++g) {
      widest = std::max(widest, work.groups[g].wide.width);
      most_tiles = std::max(most_tiles, work.groups[g].num_tiles);
    }
    work.columns_of_block = CHUNK;
    while (work.columns_of_block * most_tiles > CHUNK * GROUP) work.columns_of_block /= 2;
    work.column_blocks = static_cast<int>(blocks_of(widest, work.columns_of_block));
    work.row_blocks = static_cast<int>(blocks_of(tokens, ROWS));
    int64_t blocks = int64_t{work.row_blocks} * work.column_blocks * work.num_groups;
    launch("from_rank", kernel, blocks_for(blocks, 1), THREADS, stream, work);
  });
}

}  // namespace minift::cuda
