// What backward makes of the gradient of updates' outputs, in one pass over it: narrow = scale wide F and
// gradient = wide^T h, on the tensor cores; one launch for all terms of an op, and one that adds up parts.
//
// Bound by memory, and a wide matrix is all that counts of it: to_rank and factor_gradients_ read it once each, this
// reads it once. One product sums over its columns and the other one over its tokens, so each has parts: of COLUMNS
// columns, and of a split's tokens. With rank 16 these sums are 32 / COLUMNS and 32 / (tokens of a split) of its bytes
// when they are written, and as much when they are read, which may be from the L2 cache.
//
// A warp has 64 columns and goes down its split's tokens, 16 at a time. Its part of F stays in registers as does the
// sum of its part of the gradient; lanes load the wide matrix as rows of the first product, and transpose it among
// their registers for the second. What 16 warps have of 16 tokens' narrow rows is added up in shared memory.

#include "low_rank_both_kernels.h"

#include "low_rank_splits.h"
#include "low_rank_work.h"
#include "tensor_cores.h"

namespace minift::cuda {
namespace {

using namespace low_rank;

constexpr int STEP = 16, AHEAD = 2;            // tokens; steps that are loaded while others are multiplied
constexpr int PART = 32, PARTS = 2;            // columns, of which four lanes have a pack each; of a warp
constexpr int DEPTH = 16;                      // warps
constexpr int COLUMNS = DEPTH * PARTS * PART;  // of a block
constexpr int FEWEST_TOKENS = 128;             // of a split, or sums of gradients would be too many bytes

// One term.
struct OnePass {
  Wide wide;
  const Bf16 *narrow, *factor;
  int64_t narrow_stride, w_stride, r_stride;
  float *narrow_sums, *gradient_sums;  // (blocks of columns, tokens, ranks), (splits, width, ranks)
  float scale;
  int ranks;
  int first_block;  // of columns, of which all terms have some
};

// An argument of the kernel, which is at most 4 KB.
struct OnePasses {
  static constexpr int MOST = SplitSums::MOST / 2;

  OnePass at[MOST];
  int count, blocks;
  int64_t tokens, tokens_of_split, splits;
};
static_assert(sizeof(OnePasses) <= 3900);

// Ranks of a tile as products have them: lane 4 g + q finds ranks 4 q .. 4 q + 3 beside each other in its sums.
__device__ __forceinline__ int rank_of(int n, int column) { return column / 2 * 4 + 2 * n + column % 2; }

// Four ranks of one row, of products n = 0 and 1; half 1: of row g + 8.
__device__ __forceinline__ Quad four_ranks(const float (&sums)[2][4], int half) {
  return {sums[0][2 * half], sums[0][2 * half + 1], sums[1][2 * half], sums[1][2 * half + 1]};
}

__global__ void __launch_bounds__(DEPTH * WARP, 1) one_pass(const __grid_constant__ OnePasses work) {
  alignas(16) __shared__ float rows_of[AHEAD][DEPTH][STEP * TILE];  // of each warp
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, q = lane % 4;
  for (int64_t item = blockIdx.x; item < work.blocks * work.splits; item += gridDim.x) {
    int block = static_cast<int>(item % work.blocks), term = 0;
    while (term + 1 < work.count && work.at[term + 1].first_block <= block) ++term;
    const OnePass& of = work.at[term];
    int64_t split = item / work.blocks, first = split * work.tokens_of_split;
    int64_t end = min(first + work.tokens_of_split, work.tokens);
    int64_t column = (block - of.first_block) * COLUMNS + warp * (PARTS * PART);
    int left = static_cast<int>(of.wide.width - column), ranks = of.ranks;

    Four factor[PARTS][2][2] = {};  // part, half of a pack, product
#pragma unroll
    for (int i = 0; i < PARTS * 2 * 2 * QUAD; ++i) {
      int n = i / QUAD % 2, half = i / (2 * QUAD) % 2, part = i / (4 * QUAD), rank = rank_of(n, g);
      int w = part * PART + q * PACK + half * QUAD + i % QUAD;
      bool is_there = w < left && rank < ranks;
      const Bf16* from = of.factor + (column + w) * of.w_stride + rank * of.r_stride;
      factor[part][half][n].set(i % QUAD, is_there ? *from : Bf16{});
    }

    Eight wide[AHEAD][PARTS][2];  // of rows g and g + 8
    Four narrow[AHEAD][2];
    auto load = [&](int at, int64_t token) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int64_t row = token + g + 8 * half;
        const Bf16* from = of.wide.data + row * of.wide.stride + column + q * PACK;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          int there = row < end ? left - q * PACK - part * PART : 0;
          wide[at][part][half] = load_up_to<true, PACK>(from + part * PART, there);
        }
        const Bf16* of_row = of.narrow + row * of.narrow_stride + q * QUAD;
        narrow[at][half] = load_up_to<true, QUAD>(of_row, row < end ? ranks - q * QUAD : 0);
      }
    };
    float sums[PARTS][2][2][4] = {};  // part, pair of columns in a pack, product
#pragma unroll
    for (int at = 0; at < AHEAD; ++at) load(at, first + at * STEP);
    for (int64_t token = first; token < end; token += AHEAD * STEP) {
#pragma unroll
      for (int at = 0; at < AHEAD; ++at) {
        float row_sums[2][4] = {};
        Four of_h[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) of_h[n] = transposed(narrow[at][0].words[n], narrow[at][1].words[n]);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          const Eight &upper = wide[at][part][0], &lower = wide[at][part][1];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            Four columns[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              columns[i] = transposed(upper.words[2 * half + i], lower.words[2 * half + i]);
            }
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              multiply(row_sums[n], half_of(upper, half), half_of(lower, half), factor[part][half][n]);
              multiply(sums[part][half][n], columns[0], columns[1], of_h[n]);
            }
          }
        }
        int64_t top = token + at * STEP;
        load(at, top + AHEAD * STEP);
        for (int half = 0; half < 2; ++half) {
          float* to = &rows_of[at][warp][(half * WARP + lane) * QUAD];
          store_shared(to, from_floats<float>(four_ranks(row_sums, half)));
        }
        __syncthreads();  // nobody writes there before everybody has been here once more
        if (warp / (DEPTH / AHEAD) == at) {
          int i = threadIdx.x % (STEP * TILE), rank = i % TILE;
          float sum = 0.0f;
#pragma unroll
          for (int w = 0; w < DEPTH; ++w) sum += rows_of[at][w][i];
          int64_t row = top + i / TILE;
          float* to = of.narrow_sums + ((block - of.first_block) * work.tokens + row) * ranks + rank;
          if (row < end && rank < ranks) *to = sum * of.scale;
        }
      }
    }

    float* to = of.gradient_sums + (split * of.wide.width + column) * ranks + q * QUAD;
#pragma unroll
    for (int i = 0; i < PARTS * 2 * 2; ++i) {
      int part = i / 4, half = i / 2 % 2, word = 2 * half + i % 2;
      int w = part * PART + g / 2 * PACK + 2 * word + g % 2;
      if (w < left && q * QUAD < ranks) store_pack<true>(to + w * ranks, four_ranks(sums[part][half], i % 2), QUAD);
    }
  }
}
static_assert(DEPTH / AHEAD * WARP == STEP * TILE);  // threads that add up the rows of a step

int64_t blocks_of_columns(const RankAndGradient& of) { return blocks_of(of.gradient.wide.width, COLUMNS); }

// Of the tokens.
int64_t one_pass_splits(const std::vector<RankAndGradient>& terms, int64_t tokens) {
  int64_t blocks = 0;
  for (const RankAndGradient& of : terms) blocks += blocks_of_columns(of);
  return splits_for(blocks, tokens / FEWEST_TOKENS);
}

}  // namespace

bool is_one_pass(const std::vector<RankAndGradient>& terms) {
  return std::all_of(terms.begin(), terms.end(), [](const RankAndGradient& term) {
    const FactorGradient& of = term.gradient;
    return of.rank <= TILE && of.r_stride == 1 && in_packs(of.wide.data, of.wide.stride, of.wide.width) &&
           in_packs(of.narrow, of.narrow_stride, of.rank);
  });
}

int64_t one_pass_sums(const std::vector<RankAndGradient>& terms, int64_t tokens) {
  int64_t splits = one_pass_splits(terms, tokens), count = 0;
  for (const RankAndGradient& of : terms) {
    count += (blocks_of_columns(of) * tokens + splits * of.gradient.wide.width) * of.gradient.rank;
  }
  return count;
}

void to_rank_and_gradients(const std::vector<RankAndGradient>& terms, int64_t tokens, Bf16* narrow, float* sums,
                           cudaStream_t stream) {
  OnePasses work{};
  work.tokens = tokens;
  work.splits = one_pass_splits(terms, tokens);
  work.tokens_of_split = blocks_of(blocks_of(tokens, STEP), work.splits) * STEP;
  int64_t all_ranks = 0;
  for (const RankAndGradient& of : terms) all_ranks += of.gradient.rank;
  std::vector<SplitSum> outputs;
  auto flush = [&] {
    launch("to_rank_and_gradients_", &one_pass, blocks_for(work.blocks * work.splits, 1), DEPTH * WARP, stream, work);
    work.count = work.blocks = 0;
  };
  for (const RankAndGradient& term : terms) {
    const FactorGradient& of = term.gradient;
    int64_t blocks = blocks_of_columns(term), of_narrow = tokens * of.rank, of_gradient = of.wide.width * of.rank;
    float* gradient_sums = sums + blocks * of_narrow;
    if (work.count == OnePasses::MOST) flush();
    work.at[work.count++] = {of.wide,       of.narrow, term.factor,   of.narrow_stride, term.w_stride,
                             term.r_stride, sums,      gradient_sums, term.scale,       static_cast<int>(of.rank),
                             work.blocks};
    work.blocks += static_cast<int>(blocks);
    outputs.push_back({sums, narrow, of_narrow, of.rank, all_ranks, blocks, of_narrow, ElementType::BF16});
    outputs.push_back({gradient_sums, of.gradient, of_gradient, of.rank, of.w_stride, work.splits, of_gradient,
                       of.type});
    narrow += of.rank;
    sums = gradient_sums + work.splits * of_gradient;
  }
  flush();
  add_up("to_rank_and_gradients_", outputs, stream);
}

}  // namespace minift::cuda
