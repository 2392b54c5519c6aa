// Gradients of the factors of low-rank products, wide^T narrow, on the tensor cores: one launch for all of an op's
// terms, and one that adds up what the parts of the tokens gave, in order.
//
// Bound by memory: each wide matrix is read once, 2 T W bytes; sums of parts are 4 W R for each of them, a tenth of
// that with rank 16, 8 parts and 8192 tokens, and stay in the L2 cache. cuBLAS also reads it once and also splits the
// tokens, for a product of 4096 x 16 has too few tiles for a GPU: two launches for each of the products, before and
// after which the reference stacks narrow matrices and casts and transposes gradients (of three LoRA updates of one x:
// six launches, here two). Sums are rounded once, to the gradient's dtype, instead of to bf16 first.

#include "low_rank_gradient_kernels.h"

#include "low_rank_operands.h"
#include "low_rank_splits.h"

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

// A block has COLUMNS of a wide matrix: a warp has 32 of them, and shares CHUNK tokens with one other warp. Lane
// 4 g + q has columns 4 g .. 4 g + 3, which are rows g and g + 8 of two products, and tokens 8 q .. 8 q + 7 of 32.
constexpr int COLUMNS = 128, SHARERS = WARPS / (COLUMNS / 32);

template <bool VECTOR, int TILES>
__global__ void __launch_bounds__(THREADS, 1) sum_up(const __grid_constant__ GradientWork work, int strips) {
  using Narrows = Operands<VECTOR, TILES, CHUNK>;
  constexpr int STEP = Narrows::ALONG, STEPS = CHUNK / SHARERS / STEP;  // tokens
  constexpr int AHEAD = VECTOR ? STEPS : 1;  // that are loaded while others are multiplied
  constexpr int STRIDE = TILE + 1;  // of sums: lanes use other banks, whichever way they go
  union alignas(16) Memory {
    Four narrows[TILES][Narrows::FOURS];
    float sums[SHARERS][COLUMNS * STRIDE];
  };
  __shared__ Memory memory;
  int g = threadIdx.x % WARP / 4, q = threadIdx.x % 4, warp = threadIdx.x / WARP;
  int mine = warp % (COLUMNS / 32) * 32 + 4 * g, sharer = warp / (COLUMNS / 32);
  int splits = static_cast<int>(work.splits), items = work.num_groups * strips * splits;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const Group& group = work.groups[item / (strips * splits)];
    const GradientTile* tiles = work.tiles + group.first_tile;
    int64_t column = int64_t{item / splits % strips} * COLUMNS, split = item % splits;
    if (column >= group.wide.width) continue;
    int64_t first = split * work.tokens_of_split, end = min(first + work.tokens_of_split, work.tokens);
    int left = static_cast<int>(group.wide.width - column) - mine;
    Four wide[AHEAD][2][4];
    auto load_wide = [&](int step, int64_t token) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int64_t at = token + (sharer * STEPS + step) * STEP + 8 * q + 4 * half, stride = group.wide.stride;
        const Bf16* from = group.wide.data + at * stride + column + mine;
        load_lines<VECTOR>(wide[step % AHEAD][half], from, stride, static_cast<int>(end - at), left);
      }
    };
    Narrows narrows;
    auto load_narrows = [&](int64_t token) {
#pragma unroll
      for (int round = 0; round < Narrows::ROUNDS; ++round) {
        if (Narrows::tile(round) >= group.num_tiles) continue;
        const GradientTile& tile = tiles[Narrows::tile(round)];
        const Bf16* from = tile.narrow + token * tile.narrow_stride;
        narrows.load(round, from, tile.narrow_stride, true, static_cast<int>(end - token), tile.ranks);
      }
    };
    float sums[TILES][2][TILE / 8][4] = {};
    load_narrows(first);
#pragma unroll
    for (int step = 0; VECTOR && step < STEPS; ++step) load_wide(step, first);
    for (int64_t token = first; token < end; token += CHUNK) {
      __syncthreads();  // what was here has been multiplied, or read
#pragma unroll
      for (int round = 0; round < Narrows::ROUNDS; ++round) {
        if (Narrows::tile(round) < group.num_tiles) narrows.store(round, true, memory.narrows);
      }
      if (token + CHUNK < end) load_narrows(token + CHUNK);
      __syncthreads();
#pragma unroll(AHEAD)
      for (int step = 0; step < STEPS; ++step) {
        if (!VECTOR) load_wide(step, token);
        Four columns[2][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) columns[i / 4][i % 4] = across(wide[step % AHEAD][i / 4], i % 4);
        if (VECTOR) load_wide(step, token + CHUNK);
#pragma unroll
        for (int t = 0; t < TILES; ++t) {
          if (t >= group.num_tiles) continue;
#pragma unroll
          for (int n = 0; n < TILE / 8; ++n) {
            int at = Narrows::place((sharer * STEPS + step) * STEP + 8 * q, 8 * n + g);
            auto ranks = *reinterpret_cast<Eight*>(&memory.narrows[t][at]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const Four(&of)[4] = columns[half];
              for (int m = 0; m < 2; ++m) multiply(sums[t][m][n], of[2 * m], of[2 * m + 1], half_of(ranks, half));
            }
          }
        }
      }
    }
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      if (t >= group.num_tiles) continue;
      const GradientTile& tile = tiles[t];
      __syncthreads();  // what was here has been read
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        int m = i / 8, n = i / 4 % 2, w = mine + 2 * m + i / 2 % 2, r = 8 * n + 2 * q + i % 2;
        memory.sums[sharer][w * STRIDE + r] = sums[t][m][n][i % 4];
      }
      __syncthreads();
      for (int i = threadIdx.x; i < COLUMNS * TILE; i += THREADS) {
        bool by_rows = tile.r_stride == 1;
        int w = by_rows ? i / TILE : i % COLUMNS, r = by_rows ? i % TILE : i / COLUMNS;
        if (column + w >= group.wide.width || r >= tile.ranks) continue;
        float sum = memory.sums[0][w * STRIDE + r];
        for (int s = 1; s < SHARERS; ++s) sum += memory.sums[s][w * STRIDE + r];
        tile.sums[split * work.split_stride + (column + w) * tile.w_stride + r * tile.r_stride] = sum;
      }
    }
  }
}

void launch_sums(GradientWork& work, bool vector, cudaStream_t stream) {
  if (work.num_tiles == 0) return;
  int64_t widest = 0;
  int most_tiles = 0;
  for (int g = 0; g < work.num_groups; ++g) {
    widest = std::max(widest, work.groups[g].wide.width);
    most_tiles = std::max(most_tiles, work.groups[g].num_tiles);
  }
  int64_t strips = blocks_of(widest, COLUMNS);
  auto* kernel = most_tiles > GROUP / 2 ? &sum_up<true, GROUP> : &sum_up<true, GROUP / 2>;
  if (!vector) kernel = &sum_up<false, GROUP>;
  launch("factor_gradients_", kernel,
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
  return splits_for(blocks, tokens / CHUNK);
}

void factor_gradients(const std::vector<FactorGradient>& gradients, int64_t tokens, int64_t splits, float* sums,
                      cudaStream_t stream) {
  bool vector = true;
  GradientWork work{};
  work.tokens = tokens;
  work.splits = splits;
  work.tokens_of_split = blocks_of(blocks_of(tokens, CHUNK), splits) * CHUNK;
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
                       by_rows ? of.w_stride : of.r_stride, splits, work.split_stride, of.type});
    sums += width * of.rank;
  }
  launch_sums(work, vector, stream);
  add_up("factor_gradients_", outputs, stream);
}

}  // namespace minift::cuda
