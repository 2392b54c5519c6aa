// narrow = scale wide F on the tensor cores, for all of an op's terms in one launch.
//
// Bound by memory: rank 16 does 16 FMA for an element of a wide matrix, and an H100 could do 150 while it is read. Each
// wide matrix is read once, 2 T W bytes, as cuBLAS does; what is won are launches, and what they copy. Of three LoRA
// updates of one x the reference scales every factor, stacks them, multiplies: five launches for one or two.
//
// What counts is how many bytes are under way: a thread has 64 registers for them, all of a multiprocessor 64 KB, and
// asks for more of its rows as soon as it has multiplied. Where tokens are too few for every multiprocessor the width
// is split, too, as cuBLAS does, and a second launch adds up. Every block of ROWS tokens reads the factors, from the L2
// cache, R / ROWS of the bytes of the wide matrix; and sums of 64 ranks are as many registers as can be had. That is
// why ranks beyond 64 are left to cuBLAS, by minift/ops/low_rank.py.

#include "low_rank_operands.h"
#include "low_rank_splits.h"
#include "low_rank_work.h"

namespace minift::cuda {
namespace {

using namespace low_rank;

// What a block does: with few ranks it has half as many tokens, and twice the columns at a time, which two warps share.
// Then there are enough blocks of 8192 tokens without splits, and factors take no more of shared memory.
template <int HALVES>
struct Shape {
  static constexpr int TILES = GROUP / HALVES, COLUMNS = CHUNK * HALVES, ROW_TILES = WARPS / HALVES;
  static constexpr int ROWS = ROW_TILES * 16;
};

// Lane 4 g + q has rows g and g + 8 of its warp's.
template <bool VECTOR, int HALVES>
__global__ void __launch_bounds__(THREADS, 1) to_rank_kernel(const __grid_constant__ Work work) {
  constexpr int TILES = Shape<HALVES>::TILES, COLUMNS = Shape<HALVES>::COLUMNS, ROW_TILES = Shape<HALVES>::ROW_TILES;
  using Factors = Operands<VECTOR, TILES, COLUMNS>;
  constexpr int STEP = 64, STEPS = CHUNK / STEP, PARTS = STEP / Factors::ALONG;  // columns: 128 bytes of a row
  constexpr int AHEAD = VECTOR ? STEPS : 1;  // that are loaded while others are multiplied
  union alignas(16) Memory {
    Four factors[TILES][Factors::FOURS];
    float sums[ROW_TILES][TILES][TILE / 8][4][WARP];
  };
  __shared__ Memory memory;
  int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4;
  int row_tile = threadIdx.x / WARP % ROW_TILES, half_of_columns = threadIdx.x / WARP / ROW_TILES;
  int splits = static_cast<int>(work.splits), items = work.row_blocks * splits * work.num_groups;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const Group& group = work.groups[item / (work.row_blocks * splits)];
    const RankTile* tiles = work.tiles + group.first_tile;
    int64_t row = int64_t{item / splits % work.row_blocks} * Shape<HALVES>::ROWS + row_tile * 16 + g;
    int64_t split = item % splits;
    int64_t first = split * work.columns_of_split, end = min(first + work.columns_of_split, group.wide.width);
    const Bf16* rows[2];  // beyond the last token that one once more: nobody stores what comes of it
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows[r] = group.wide.data + min(row + 8 * r, work.tokens - 1) * group.wide.stride + q * PACK;
    }
    Eight wide[AHEAD][PARTS][2];
    auto load_wide = [&](int step, int64_t column) {
      int left = static_cast<int>(end - column) - q * PACK;
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        int at = half_of_columns * CHUNK + step * STEP + part * Factors::ALONG;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          wide[step % AHEAD][part][r] = load_up_to<VECTOR, PACK>(rows[r] + column + at, left - at);
        }
      }
    };
    Factors factors;
    auto load_factors = [&](int64_t column) {
#pragma unroll
      for (int round = 0; round < Factors::ROUNDS; ++round) {
        if (Factors::tile(round) >= group.num_tiles) continue;
        const RankTile& tile = tiles[Factors::tile(round)];
        const Bf16* from = tile.factor + column * (tile.ranks_adjacent ? tile.factor_stride : 1);
        int left = static_cast<int>(end - column);
        factors.load(round, from, tile.factor_stride, tile.ranks_adjacent, left, tile.ranks);
      }
    };
    float sums[TILES][TILE / 8][4] = {};
    load_factors(first);
#pragma unroll
    for (int step = 0; VECTOR && step < STEPS; ++step) load_wide(step, first);
    for (int64_t column = first; column < end; column += COLUMNS) {
      __syncthreads();  // what was here has been multiplied, or read
#pragma unroll
      for (int round = 0; round < Factors::ROUNDS; ++round) {
        int t = Factors::tile(round);
        if (t < group.num_tiles) factors.store(round, tiles[t].ranks_adjacent, memory.factors);
      }
      if (column + COLUMNS < end) load_factors(column + COLUMNS);
      __syncthreads();
#pragma unroll(AHEAD)
      for (int step = 0; step < STEPS; ++step) {
        if (!VECTOR) load_wide(step, column);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          const Eight(&of_rows)[2] = wide[step % AHEAD][part];
#pragma unroll
          for (int t = 0; t < TILES; ++t) {
            if (t >= group.num_tiles) continue;
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n) {
              int k = half_of_columns * CHUNK + step * STEP + part * Factors::ALONG + q * PACK;
              auto factor = *reinterpret_cast<Eight*>(&memory.factors[t][Factors::place(k, 8 * n + g)]);
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                multiply(sums[t][n], half_of(of_rows[0], half), half_of(of_rows[1], half), half_of(factor, half));
              }
            }
          }
        }
        if (VECTOR) load_wide(step, column + COLUMNS);
      }
    }
    if (HALVES > 1) {
      auto& of_tile = memory.sums[row_tile];
      __syncthreads();  // factors end, sums begin
#pragma unroll
      for (int i = 0; i < TILES * TILE / 8 * 4; ++i) {
        if (half_of_columns > 0) of_tile[i / 8][i / 4 % 2][i % 4][lane] = sums[i / 8][i / 4 % 2][i % 4];
      }
      __syncthreads();
      if (half_of_columns > 0) continue;
#pragma unroll
      for (int i = 0; i < TILES * TILE / 8 * 4; ++i) {
        sums[i / 8][i / 4 % 2][i % 4] += of_tile[i / 8][i / 4 % 2][i % 4][lane];
      }
    }
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      if (t >= group.num_tiles) continue;
#pragma unroll
      for (int i = 0; i < TILE / 8 * 4; ++i) {
        int64_t of_row = row + i / 2 % 2 * 8;
        int rank = i / 4 * 8 + 2 * q + i % 2;
        if (rank >= tiles[t].ranks || of_row >= work.tokens) continue;
        float sum = sums[t][i / 4][i % 4] * tiles[t].scale;
        Bf16* to = tiles[t].narrow + of_row * tiles[t].narrow_stride + rank;
        if (work.sums == nullptr) *to = from_float<Bf16>(sum);
        else work.sums[split * work.split_stride + (to - work.narrow)] = sum;
      }
    }
  }
}

bool has_few_ranks(const std::vector<LowRankGroup>& groups) {
  return std::all_of(groups.begin(), groups.end(), [](const LowRankGroup& group) {
    int64_t tiles = 0;
    for (const LowRankTerm& term : group.terms) tiles += blocks_of(term.rank, TILE);
    return tiles <= Shape<2>::TILES;
  });
}

// Calls function(shape, kernel).
template <class Function>
auto with_shape(const std::vector<LowRankGroup>& groups, const Function& function) {
  if (!vectors(groups)) return function(Shape<1>(), &to_rank_kernel<false, 1>);
  if (!has_few_ranks(groups)) return function(Shape<1>(), &to_rank_kernel<true, 1>);
  return function(Shape<2>(), &to_rank_kernel<true, 2>);
}

}  // namespace

int64_t to_rank_splits(const std::vector<LowRankGroup>& groups, int64_t tokens) {
  return with_shape(groups, [&](auto shape, auto*) {
    int64_t parts = 0;
    for_each_work(groups, tokens, shape.TILES, [&](const Work& work) { parts += work.num_groups; });
    return splits_for(blocks_of(tokens, shape.ROWS) * parts, blocks_of(widest_of(groups), shape.COLUMNS));
  });
}

void to_rank(const std::vector<LowRankGroup>& groups, int64_t tokens, Bf16* narrow, int64_t rank, int64_t splits,
             float* sums, cudaStream_t stream) {
  int64_t widest = widest_of(groups), count = tokens * rank;
  with_shape(groups, [&](auto shape, auto* kernel) {
    for_each_work(groups, tokens, shape.TILES, [&](Work& work) {
      work.splits = splits;
      work.columns_of_split = blocks_of(blocks_of(widest, shape.COLUMNS), splits) * shape.COLUMNS;
      work.split_stride = count;
      work.sums = splits > 1 ? sums : nullptr;
      work.narrow = narrow;
      work.row_blocks = static_cast<int>(blocks_of(tokens, shape.ROWS));
      int64_t blocks = work.row_blocks * splits * work.num_groups;
      launch("to_rank", kernel, blocks_for(blocks, 1), THREADS, stream, work);
    });
  });
  if (splits == 1) return;
  add_up("to_rank", {{sums, narrow, count, std::max<int64_t>(1, count), 0, splits, count, ElementType::BF16}}, stream);
}

}  // namespace minift::cuda
