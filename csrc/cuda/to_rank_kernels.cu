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

// Lane 4 g + q has rows g and g + 8 of its warp's.
template <bool VECTOR>
__global__ void __launch_bounds__(THREADS, 1) to_rank_kernel(const __grid_constant__ Work work) {
  using Factors = Operands<VECTOR>;
  constexpr int STEP = 64, STEPS = CHUNK / STEP, PARTS = STEP / Factors::ALONG;  // columns: 128 bytes of a row
  constexpr int AHEAD = VECTOR ? STEPS : 1;  // that are loaded while others are multiplied
  alignas(16) __shared__ Four shared[GROUP][Factors::FOURS];
  int g = threadIdx.x % WARP / 4, q = threadIdx.x % 4;
  int64_t row_blocks = (work.tokens + ROWS - 1) / ROWS;
  for (int64_t item = blockIdx.x; item < row_blocks * work.splits * work.num_groups; item += gridDim.x) {
    const Group& group = work.groups[item / (row_blocks * work.splits)];
    const RankTile* tiles = work.tiles + group.first_tile;
    int64_t row = item / work.splits % row_blocks * ROWS + threadIdx.x / WARP * 16 + g, split = item % work.splits;
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
        int at = step * STEP + part * Factors::ALONG;
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
    float sums[GROUP][TILE / 8][4] = {};
#pragma unroll
    for (int step = 0; VECTOR && step < STEPS; ++step) load_wide(step, first);
    load_factors(first);
    for (int64_t column = first; column < end; column += CHUNK) {
      __syncthreads();  // what was here has been multiplied
#pragma unroll
      for (int round = 0; round < Factors::ROUNDS; ++round) {
        int t = Factors::tile(round);
        if (t < group.num_tiles) factors.store(round, tiles[t].ranks_adjacent, shared);
      }
      __syncthreads();
#pragma unroll(AHEAD)
      for (int step = 0; step < STEPS; ++step) {
        if (!VECTOR) load_wide(step, column);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          const Eight(&of_rows)[2] = wide[step % AHEAD][part];
#pragma unroll
          for (int t = 0; t < GROUP; ++t) {
            if (t >= group.num_tiles) continue;
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n) {
              int at = Factors::place(step * STEP + part * Factors::ALONG + q * PACK, 8 * n + g);
              auto factor = *reinterpret_cast<Eight*>(&shared[t][at]);
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                multiply(sums[t][n], half_of(of_rows[0], half), half_of(of_rows[1], half), half_of(factor, half));
              }
            }
          }
        }
        if (VECTOR) load_wide(step, column + CHUNK);
      }
      if (column + CHUNK < end) load_factors(column + CHUNK);
    }
#pragma unroll
    for (int t = 0; t < GROUP; ++t) {
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

}  // namespace

int64_t to_rank_splits(const std::vector<LowRankGroup>& groups, int64_t tokens) {
  int64_t parts = 0;
  for_each_work(groups, tokens, GROUP, [&](const Work& work) { parts += work.num_groups; });
  return splits_for(blocks_of(tokens, ROWS) * parts, blocks_of(widest_of(groups), CHUNK));
}

void to_rank(const std::vector<LowRankGroup>& groups, int64_t tokens, Bf16* narrow, int64_t rank, int64_t splits,
             float* sums, cudaStream_t stream) {
  int64_t widest = widest_of(groups), count = tokens * rank;
  auto* kernel = vectors(groups) ? &to_rank_kernel<true> : &to_rank_kernel<false>;
  for_each_work(groups, tokens, GROUP, [&](Work& work) {
    work.splits = splits;
    work.columns_of_split = blocks_of(blocks_of(widest, CHUNK), splits) * CHUNK;
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

}  // namespace minift::cuda
