// Gradients of the factors of low-rank products, wide^T narrow, on the tensor cores: one launch for all of an op's
// terms, and one that adds up what the parts of the tokens gave, in order.
//
// Bound by memory: each wide matrix is read once, 2 T W bytes; sums of parts are 4 W R for each of them, a tenth of
// that with rank 16, 8 parts and 8192 tokens, and stay in the L2 cache. cuBLAS also reads it once and also splits the
// tokens, for a product of 4096 x 16 has too few tiles for a GPU: two launches for each of the products, before and
// after which the reference stacks narrow matrices and casts and transposes gradients (of three LoRA updates of one x:
// six launches, here two). Sums are rounded once, to the gradient's dtype, instead of to bf16 first.

#include "low_rank_gradient_kernels.h"

#include "low_rank_splits.h"
#include "low_rank_tiles.h"

namespace minift::cuda {
namespace {

using namespace low_rank;

// Up to TILE ranks of a gradient. The sum of element (w, r) is at sums[w * w_stride + r * r_stride], one of them 1.
struct GradientTile {
  const Bf16* narrow;
  int64_t narrow_stride;
  float* sums;
  int64_t w_stride, r_stride;
  int ranks;
};

struct GradientWork {
  static constexpr int MOST_TILES = 48, MOST_GROUPS = 32;

  GradientTile tiles[MOST_TILES];
  Group groups[MOST_GROUPS];
  int num_tiles, num_groups;
  int64_t tokens, tokens_of_split, splits, split_stride;
};
static_assert(sizeof(GradientWork) <= 3900);

template <bool VECTOR>
__global__ void __launch_bounds__(THREADS, VECTOR ? 2 : 1)
    sum_up(const __grid_constant__ GradientWork work, int64_t strips) {
  struct Tiles {
    Bf16 wide[ROWS * STRIDE];
    Bf16 narrows[GROUP][ROWS * TILE];
  };
  union alignas(32) Memory {
    Tiles tiles;
    float sums[GROUP][COLUMNS * TILE];
  };
  static_assert(COLUMNS == THREADS / WARP * TILE);
  __shared__ Memory memory;
  int first_of_warp = threadIdx.x / WARP * TILE;  // of the columns
  for (int64_t item = blockIdx.x; item < work.num_groups * strips * work.splits; item += gridDim.x) {
    const Group& group = work.groups[item / (strips * work.splits)];
    const GradientTile* tiles = work.tiles + group.first_tile;
    int64_t column = item / work.splits % strips * COLUMNS, split = item % work.splits;
    if (column >= group.wide.width) continue;
    int64_t first = split * work.tokens_of_split, end = min(first + work.tokens_of_split, work.tokens);
    Accumulator sums[GROUP];
#pragma unroll
    for (int t = 0; t < GROUP; ++t) wmma::fill_fragment(sums[t], 0.0f);
    WideTile<VECTOR> wide;
    NarrowTiles<VECTOR> narrows;
    wide.load(group.wide, first, end, column);
    narrows.load(tiles, group.num_tiles, first, end);
    for (int64_t token = first; token < end; token += ROWS) {
      __syncthreads();  // what was here has been multiplied, or read
      wide.store(memory.tiles.wide);
      narrows.store(memory.tiles.narrows);
      if (token + ROWS < end) {
        wide.load(group.wide, token + ROWS, end, column);
        narrows.load(tiles, group.num_tiles, token + ROWS, end);
      }
      __syncthreads();
#pragma unroll 1
      for (int k = 0; k < ROWS; k += TILE) {
        auto a = load_a<ColumnsOfA>(memory.tiles.wide + k * STRIDE + first_of_warp, STRIDE);
#pragma unroll
        for (int t = 0; t < GROUP; ++t) {
          if (t < group.num_tiles) multiply<RowsOfB>(sums[t], a, memory.tiles.narrows[t] + k * TILE, TILE);
        }
      }
    }
    __syncthreads();  // tiles end, sums begin
#pragma unroll
    for (int t = 0; t < GROUP; ++t) {
      if (t >= group.num_tiles) continue;
      if (tiles[t].r_stride == 1) {
        wmma::store_matrix_sync(memory.sums[t] + first_of_warp * TILE, sums[t], TILE, wmma::mem_row_major);
      } else {
        wmma::store_matrix_sync(memory.sums[t] + first_of_warp, sums[t], COLUMNS, wmma::mem_col_major);
      }
    }
    __syncthreads();
    for (int t = 0; t < group.num_tiles; ++t) {
      const GradientTile& tile = tiles[t];
      for (int i = threadIdx.x; i < COLUMNS * TILE; i += THREADS) {
        bool by_rows = tile.r_stride == 1;
        int w = by_rows ? i / TILE : i % COLUMNS, r = by_rows ? i % TILE : i / COLUMNS;
        if (column + w >= group.wide.width || r >= tile.ranks) continue;
        tile.sums[split * work.split_stride + (column + w) * tile.w_stride + r * tile.r_stride] = memory.sums[t][i];
      }
    }
  }
}

void launch_sums(GradientWork& work, bool vector, cudaStream_t stream) {
  if (work.num_tiles == 0) return;
  int64_t widest = 0;
  for (int g = 0; g < work.num_groups; ++g) widest = std::max(widest, work.groups[g].wide.width);
  int64_t strips = blocks_of(widest, COLUMNS);
  launch("factor_gradients_", vector ? &sum_up<true> : &sum_up<false>,
         blocks_for(work.num_groups * strips * work.splits, 1), THREADS, stream, work, strips);
  work.num_tiles = work.num_groups = 0;
}

}  // namespace

int64_t gradient_splits(const std::vector<FactorGradient>& gradients, int64_t tokens) {
  int64_t blocks = 0;
  for (const FactorGradient& of : gradients) {
    bool joins = &of != &gradients[0] && (&of)[-1].wide == of.wide;  // the group of the last one
    if (!joins) blocks += blocks_of(of.wide.width, COLUMNS);
  }
  return splits_for(blocks, tokens / (4 * ROWS));
}

void factor_gradients(const std::vector<FactorGradient>& gradients, int64_t tokens, int64_t splits, float* sums,
                      cudaStream_t stream) {
  bool vector = true;
  GradientWork work{};
  work.tokens = tokens;
  work.splits = splits;
  work.tokens_of_split = blocks_of(blocks_of(tokens, ROWS), splits) * ROWS;
  for (const FactorGradient& of : gradients) {
    vector &= in_packs(of.wide.data, of.wide.stride, of.wide.width) && in_packs(of.narrow, of.narrow_stride, of.rank);
    work.split_stride += of.wide.width * of.rank;
  }
  std::vector<SplitSum> outputs;
  for (const FactorGradient& of : gradients) {
    bool by_rows = of.r_stride == 1;
    int64_t width = of.wide.width, w_stride = by_rows ? of.rank : 1, r_stride = by_rows ? 1 : width;
    for (int64_t rank = 0; rank < of.rank; rank += TILE) {
      if (work.num_tiles == GradientWork::MOST_TILES || work.num_groups == GradientWork::MOST_GROUPS) {
        launch_sums(work, vector, stream);
      }
      Group* group = work.num_groups > 0 ? &work.groups[work.num_groups - 1] : nullptr;
      if (group == nullptr || group->num_tiles == GROUP || !(group->wide == of.wide)) {
        group = &work.groups[work.num_groups++];
        *group = {of.wide, work.num_tiles, 0};
      }
      ++group->num_tiles;
      work.tiles[work.num_tiles++] = {of.narrow + rank, of.narrow_stride, sums + rank * r_stride,
                                      w_stride,         r_stride,         int(std::min<int64_t>(TILE, of.rank - rank))};
    }
    outputs.push_back({sums, of.gradient, width * of.rank, by_rows ? of.rank : width,
                       by_rows ? of.w_stride : of.r_stride, of.type});
    sums += width * of.rank;
  }
  launch_sums(work, vector, stream);
  for (size_t done = 0; done < outputs.size(); done += SplitSums::MOST) {
    unsigned count = std::min<size_t>(SplitSums::MOST, outputs.size() - done);
    SplitSums some{};
    some.splits = splits;
    some.split_stride = work.split_stride;
    int64_t largest = 0;
    for (unsigned i = 0; i < count; ++i) {
      some.at[i] = outputs[done + i];
      largest = std::max(largest, some.at[i].count);
    }
    launch("factor_gradients_", add_splits, dim3(blocks_for(largest, ADD_THREADS), count), ADD_THREADS,
           stream, some);
  }
}

}  // namespace minift::cuda
