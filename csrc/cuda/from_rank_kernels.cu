// wide = bias + the sum of narrow F^T on the tensor cores, for all of an op's terms in one launch.
//
// Bound by memory: each wide matrix is written once, 2 T W bytes, as cuBLAS does; what is won are launches, and what
// they copy (of a sum of three updates: two stacks and a product). Sums become bf16 and go to memory from where the
// tensor cores left them, in whole lines of the cache. A warp waits for nothing but its small operands, so nothing is
// loaded ahead: a multiprocessor has many blocks instead, of which some always write. Each reads its factors, R / ROWS
// of the bytes that it writes, from the L2 cache.

#include "column_factors.h"

namespace minift::cuda {
namespace {

using namespace low_rank;

template <bool VECTOR>
__global__ void __launch_bounds__(THREADS, VECTOR ? 3 : 1) from_rank_kernel(const __grid_constant__ Work work) {
  constexpr int COLUMNS = ColumnFactors::COLUMNS, TOKENS = ColumnFactors::TOKENS;
  alignas(16) __shared__ Four shared[ColumnFactors::MOST_FOURS];
  int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4;
  int blocks = work.row_blocks * work.column_blocks, items = blocks * work.num_groups;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const Group& group = work.groups[item / blocks];
    const RankTile* tiles = work.tiles + group.first_tile;
    // Neighbours in the grid have neighbouring columns: rows of a wide matrix are written in order.
    int64_t first = int64_t{item % work.column_blocks} * work.columns_of_block, width = group.wide.width;
    if (first >= width) continue;
    int columns = work.columns_of_block, columns_left = static_cast<int>(min(width - first, int64_t{columns}));
    __syncthreads();  // what was here has been multiplied
    ColumnFactors::load<VECTOR>(tiles, group.num_tiles, first, columns, columns_left, shared);
    __syncthreads();
    int row = item % blocks / work.column_blocks * ROWS;
    int end = static_cast<int>(min(int64_t{row} + ROWS, work.tokens));
    for (row += threadIdx.x / WARP * TOKENS; row < end; row += WARPS * TOKENS) {
      auto narrow = [&](int t) { return load_narrow<VECTOR>(tiles[t], row + g, row + g < end); };
      Four narrows[GROUP];
#pragma unroll
      for (int t = 0; t < GROUP; ++t) {
        if (t < group.num_tiles) narrows[t] = narrow(t);
      }
#pragma unroll 1
      for (int c = 0; c < columns_left; c += COLUMNS) {
        int column = c + g * PACK, left = columns_left - column;
        Eight bias{};
        if (group.bias != nullptr && left > 0) bias = load_elements<VECTOR>(group.bias + first + column, left);
        float sums[4][4];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          for (int k = 0; k < PACK; ++k) ColumnFactors::sum(sums, r, k) = to_float(bias.at(k));
        }
        __syncwarp();  // lanes that had nothing to store wait for the others
        auto factors = [&](int t) { return shared + (t * columns + c) * (TILE / QUAD); };
#pragma unroll
        for (int t = 0; t < GROUP; ++t) {
          if (t < group.num_tiles) ColumnFactors::add(sums, narrows[t], factors(t));
        }
#pragma unroll 1
        for (int t = GROUP; t < group.num_tiles; ++t) ColumnFactors::add(sums, narrow(t), factors(t));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          int token = row + 2 * q + r;
          if (token >= end || left <= 0) continue;
          Pack pack;
#pragma unroll
          for (int k = 0; k < PACK; ++k) pack.at[k] = ColumnFactors::sum(sums, r, k);
          Bf16* to = group.wide.data + token * group.wide.stride + first + column;
          store_pack<VECTOR>(to, pack, VECTOR ? PACK : left);
        }
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
