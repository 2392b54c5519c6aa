// Products of wide bf16 matrices with narrow ones on the tensor cores: one launch for all of an op's terms.
//
// Bound by memory: rank 16 does 16 FMA for an element of a wide matrix, and an H100 could do 150 while it is read.
// to_rank reads each wide matrix once, from_rank writes it, 2 T W bytes: as cuBLAS does, so what is won are launches,
// and what they copy. Of three LoRA updates of one x the reference scales every factor, stacks them, multiplies: five
// launches for one or two (from_rank of a sum: two stacks and a product). A launch costs the GPU about 2 microseconds,
// reading x (8192, 4096) 20. Where tokens are too few for every multiprocessor, to_rank also splits the width, as
// cuBLAS does, and a second launch adds up. Factors and narrow matrices are read again by every block, from the L2
// cache: with 64 tokens a block, R / 64 of the bytes of the wide matrix. That is why ranks beyond 64 are better left to
// cuBLAS, and minift/ops/low_rank.py does so.

#include "low_rank_kernels.h"

#include "low_rank_splits.h"
#include "low_rank_tiles.h"

namespace minift::cuda {
namespace {

using namespace low_rank;

template <bool VECTOR>
__global__ void __launch_bounds__(THREADS, VECTOR ? 2 : 1) to_rank_kernel(const __grid_constant__ Work work) {
  struct Tiles {
    Bf16 wide[ROWS * STRIDE];
    Bf16 factors[GROUP][TILE * STRIDE];
  };
  union alignas(32) Memory {
    Tiles tiles;
    float sums[2][ROWS * GROUP * TILE];
  };
  __shared__ Memory memory;
  // Warps share the rows, and the columns between two of them.
  int warp = threadIdx.x / WARP, row_tile = warp % (ROWS / TILE), half = warp / (ROWS / TILE);
  int64_t row_blocks = (work.tokens + ROWS - 1) / ROWS;
  for (int64_t item = blockIdx.x; item < row_blocks * work.splits * work.num_groups; item += gridDim.x) {
    const Group& group = work.groups[item / (row_blocks * work.splits)];
    const RankTile* tiles = work.tiles + group.first_tile;
    int64_t first_row = item / work.splits % row_blocks * ROWS, split = item % work.splits;
    int64_t first = split * work.columns_of_split, end = min(first + work.columns_of_split, group.wide.width);
    Accumulator sums[GROUP];
#pragma unroll
    for (int t = 0; t < GROUP; ++t) wmma::fill_fragment(sums[t], 0.0f);
    WideTile<VECTOR> wide;
    FactorTiles<VECTOR> factors;
    wide.load(group.wide, first_row, work.tokens, first);
    factors.load(tiles, group.num_tiles, group.wide.width, first);
    for (int64_t column = first; column < end; column += COLUMNS) {
      __syncthreads();  // what was here has been multiplied, or read
      wide.store(memory.tiles.wide);
      factors.store(tiles, group.num_tiles, memory.tiles.factors);
      if (column + COLUMNS < end) {
        wide.load(group.wide, first_row, work.tokens, column + COLUMNS);
        factors.load(tiles, group.num_tiles, group.wide.width, column + COLUMNS);
      }
      __syncthreads();
#pragma unroll 1
      for (int k = 0; k < COLUMNS / 2; k += TILE) {
        int at = half * (COLUMNS / 2) + k;
        auto a = load_a<RowsOfA>(memory.tiles.wide + row_tile * TILE * STRIDE + at, STRIDE);
#pragma unroll
        for (int t = 0; t < GROUP; ++t) {
          if (t >= group.num_tiles) continue;
          if (tiles[t].ranks_adjacent) multiply<RowsOfB>(sums[t], a, memory.tiles.factors[t] + at * TILE, TILE);
          else multiply<ColumnsOfB>(sums[t], a, memory.tiles.factors[t] + at, STRIDE);
        }
      }
    }
    __syncthreads();  // tiles end, sums begin
#pragma unroll
    for (int t = 0; t < GROUP; ++t) {
      float* to = memory.sums[half] + row_tile * TILE * GROUP * TILE + t * TILE;
      wmma::store_matrix_sync(to, sums[t], GROUP * TILE, wmma::mem_row_major);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * GROUP * TILE; i += THREADS) {
      int64_t row = first_row + i / (GROUP * TILE);
      int t = i / TILE % GROUP, rank = i % TILE;
      if (t >= group.num_tiles || rank >= tiles[t].ranks || row >= work.tokens) continue;
      float sum = (memory.sums[0][i] + memory.sums[1][i]) * tiles[t].scale;
      Bf16* to = tiles[t].narrow + row * tiles[t].narrow_stride + rank;
      if (work.sums == nullptr) *to = from_float<Bf16>(sum);
      else work.sums[split * work.split_stride + (to - work.narrow)] = sum;
    }
  }
}

template <bool VECTOR>
__global__ void __launch_bounds__(THREADS, VECTOR ? 2 : 1) from_rank_kernel(const __grid_constant__ Work work) {
  struct Tiles {
    Bf16 factors[GROUP][TILE * STRIDE];
    Bf16 narrows[GROUP][ROWS * TILE];
  };
  union alignas(32) Memory {
    Tiles tiles;
    float sums[ROWS * COLUMNS];
  };
  __shared__ Memory memory;
  using Places = WideTile<VECTOR>;
  constexpr int COLUMN_TILES = COLUMNS / TILE / 2;  // of a warp
  int warp = threadIdx.x / WARP, row_tile = warp % (ROWS / TILE), half = warp / (ROWS / TILE);
  int64_t row_blocks = (work.tokens + ROWS - 1) / ROWS, widest = 0;
  for (int g = 0; g < work.num_groups; ++g) widest = max(widest, work.groups[g].wide.width);
  int64_t column_blocks = (widest + COLUMNS - 1) / COLUMNS, blocks = row_blocks * column_blocks;
  for (int64_t item = blockIdx.x; item < blocks * work.num_groups; item += gridDim.x) {
    const Group& group = work.groups[item / blocks];
    // Neighbours in the grid have neighbouring columns: rows of a wide matrix are written in order.
    int64_t first_row = item % blocks / column_blocks * ROWS, column = item % column_blocks * COLUMNS;
    if (column >= group.wide.width) continue;
    PackOf<Bf16> bias{};
    if (group.bias != nullptr) {
      bias = load_up_to<VECTOR>(group.bias + column + Places::column(), group.wide.width - column - Places::column());
    }
    Accumulator sums[COLUMN_TILES];
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; ++c) wmma::fill_fragment(sums[c], 0.0f);
    for (int done = 0; done < group.num_tiles; done += GROUP) {
      const RankTile* tiles = work.tiles + group.first_tile + done;
      int count = min(GROUP, group.num_tiles - done);
      FactorTiles<VECTOR> factors;
      NarrowTiles<VECTOR> narrows;
      factors.load(tiles, count, group.wide.width, column);
      narrows.load(tiles, count, first_row, work.tokens);
      __syncthreads();  // what was here has been multiplied, or read
      factors.store(tiles, count, memory.tiles.factors);
      narrows.store(memory.tiles.narrows);
      __syncthreads();
#pragma unroll 1
      for (int t = 0; t < count; ++t) {
        auto a = load_a<RowsOfA>(memory.tiles.narrows[t] + row_tile * TILE * TILE, TILE);
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; ++c) {
          int at = half * (COLUMNS / 2) + c * TILE;
          if (tiles[t].ranks_adjacent) multiply<ColumnsOfB>(sums[c], a, memory.tiles.factors[t] + at * TILE, TILE);
          else multiply<RowsOfB>(sums[c], a, memory.tiles.factors[t] + at, STRIDE);
        }
      }
    }
    __syncthreads();  // tiles end, sums begin
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; ++c) {
      float* to = memory.sums + row_tile * TILE * COLUMNS + half * (COLUMNS / 2) + c * TILE;
      wmma::store_matrix_sync(to, sums[c], COLUMNS, wmma::mem_row_major);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Places::PACKS; ++i) {
      int64_t row = first_row + Places::row(i), left = group.wide.width - column - Places::column();
      if (row >= work.tokens || left <= 0) continue;
      Pack pack = to_floats(bias);
#pragma unroll
      for (int k = 0; k < PACK; ++k) pack.at[k] += memory.sums[Places::row(i) * COLUMNS + Places::column() + k];
      store_pack<VECTOR>(group.wide.data + row * group.wide.stride + column + Places::column(), pack, left);
    }
  }
}

// Whether every access can be a whole pack.
bool vectors(const std::vector<LowRankGroup>& groups) {
  bool all = true;
  for (const LowRankGroup& group : groups) {
    all &= in_packs(group.wide.data, group.wide.stride, group.wide.width);
    all &= group.bias == nullptr || aligned(group.bias);
    for (const LowRankTerm& term : group.terms) {
      all &= in_packs(term.factor, term.factor_stride, term.rank);
      all &= in_packs(term.narrow, term.narrow_stride, term.rank);
    }
  }
  return all;
}

int64_t widest_of(const std::vector<LowRankGroup>& groups) {
  int64_t widest = 0;
  for (const LowRankGroup& group : groups) widest = std::max(widest, group.wide.width);
  return widest;
}

// run(work) with the groups, cut where they have more than `most_tiles` tiles, as often as it takes.
template <class Run>
void for_each_work(const std::vector<LowRankGroup>& groups, int64_t tokens, int64_t most_tiles, const Run& run) {
  Work work{};
  auto flush = [&] {
    work.tokens = tokens;
    run(work);
    work = Work{};
  };
  for (const LowRankGroup& group : groups) {
    std::vector<RankTile> tiles;
    for (const LowRankTerm& term : group.terms) {
      for (int64_t rank = 0; rank < term.rank; rank += TILE) {
        tiles.push_back({term.narrow + rank, term.factor + rank * (term.ranks_adjacent ? 1 : term.factor_stride),
                         term.narrow_stride, term.factor_stride, term.scale,
                         static_cast<int>(std::min<int64_t>(TILE, term.rank - rank)), term.ranks_adjacent});
      }
    }
    int64_t end = tiles.size();
    for (int64_t first = 0; first < end; first += most_tiles) {
      int64_t count = std::min(most_tiles, end - first);
      if (work.num_groups == Work::MOST_GROUPS || work.num_tiles + count > Work::MOST_TILES) flush();
      work.groups[work.num_groups++] = {group.wide, work.num_tiles, static_cast<int>(count), group.bias};
      for (int64_t t = first; t < first + count; ++t) work.tiles[work.num_tiles++] = tiles[t];
    }
  }
  if (work.num_tiles > 0) flush();
}

}  // namespace

int64_t to_rank_splits(const std::vector<LowRankGroup>& groups, int64_t tokens) {
  int64_t parts = 0;
  for_each_work(groups, tokens, GROUP, [&](const Work& work) { parts += work.num_groups; });
  return splits_for(blocks_of(tokens, ROWS) * parts, blocks_of(widest_of(groups), COLUMNS));
}

void to_rank(const std::vector<LowRankGroup>& groups, int64_t tokens, Bf16* narrow, int64_t rank, int64_t splits,
             float* sums, cudaStream_t stream) {
  int64_t widest = widest_of(groups), count = tokens * rank;
  auto* kernel = vectors(groups) ? &to_rank_kernel<true> : &to_rank_kernel<false>;
  for_each_work(groups, tokens, GROUP, [&](Work& work) {
    work.splits = splits;
    work.columns_of_split = blocks_of(blocks_of(widest, COLUMNS), splits) * COLUMNS;
    work.split_stride = count;
    work.sums = splits > 1 ? sums : nullptr;
    work.narrow = narrow;
    int64_t blocks = blocks_of(tokens, ROWS) * splits * work.num_groups;
    launch("to_rank", kernel, blocks_for(blocks, 1), THREADS, stream, work);
  });
  if (splits == 1) return;
  SplitSums all{{{sums, narrow, count, std::max<int64_t>(1, count), 0, ElementType::BF16}}, splits, count};
  launch("to_rank", add_splits, blocks_for(count, ADD_THREADS), ADD_THREADS, stream, all);
}

// A group is not cut: its wide matrix is written once.
void from_rank(const std::vector<LowRankGroup>& groups, int64_t tokens, cudaStream_t stream) {
  static_assert(FROM_RANK_TILES <= Work::MOST_TILES);
  auto* kernel = vectors(groups) ? &from_rank_kernel<true> : &from_rank_kernel<false>;
  for_each_work(groups, tokens, FROM_RANK_TILES, [&](const Work& work) {
    int64_t widest = 0;
    for (int g = 0; g < work.num_groups; ++g) widest = std::max(widest, work.groups[g].wide.width);
    int64_t blocks = blocks_of(tokens, ROWS) * blocks_of(widest, COLUMNS) * work.num_groups;
    launch("from_rank", kernel, blocks_for(blocks, 1), THREADS, stream, work);
  });
}

}  // namespace minift::cuda
