// SwiGLU of a gate and an up that lack their low-rank updates, which are made here, on the tensor cores, and go
// nowhere.
//
// Bound by memory, and moves what SwiGLU alone moves: each wide matrix is read or written once, in whole lines, from
// and to the registers where the tensor cores have the sums (column_factors.h). All are fp32 until the result is
// rounded.

#include "updated_swiglu_kernels.h"

#include "column_factors.h"
#include "swiglu_math.h"

namespace minift::cuda {
namespace {

using namespace low_rank;

constexpr int MOST_TILES = 3 * MOST_UPDATE_TILES;

// MATRICES: gate and up, and in backward dy. OUTPUTS: y; or dgate, dup and perhaps y.
template <int MATRICES, int OUTPUTS>
struct Matrices {
  RankTile tiles[MOST_TILES];    // those of gate, of up, of dy
  int first_tiles[MATRICES + 1];  // in `tiles`
  const Bf16* inputs[MATRICES];
  Bf16* outputs[OUTPUTS];
  int64_t tokens, width;
  int columns_of_block, column_blocks, row_blocks;
};

template <int MATRICES, int OUTPUTS>
__global__ void __launch_bounds__(THREADS, OUTPUTS == 1 ? 3 : 2)
    updated_swiglu_kernel(const __grid_constant__ Matrices<MATRICES, OUTPUTS> work) {
  constexpr int COLUMNS = ColumnFactors::COLUMNS, TOKENS = ColumnFactors::TOKENS;
  alignas(16) __shared__ Four shared[ColumnFactors::MOST_FOURS];
  int lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4, columns = work.columns_of_block;
  for (int item = blockIdx.x; item < work.row_blocks * work.column_blocks; item += gridDim.x) {
    // Neighbours in the grid have neighbouring columns: rows of a wide matrix are written in order.
    int64_t first = int64_t{item % work.column_blocks} * columns;
    int columns_left = static_cast<int>(min(work.width - first, int64_t{columns}));
    __syncthreads();  // what was here has been multiplied
    ColumnFactors::load<true>(work.tiles, work.first_tiles[MATRICES], first, columns, columns_left, shared);
    __syncthreads();
    int row = item / work.column_blocks * ROWS, end = static_cast<int>(min(int64_t{row} + ROWS, work.tokens));
    for (row += threadIdx.x / WARP * TOKENS; row < end; row += WARPS * TOKENS) {
      auto narrow = [&](int t) { return load_narrow<true>(work.tiles[t], row + g, row + g < end); };
      Four narrows[MATRICES];  // of each matrix's first tile, as a rule its only one
#pragma unroll
      for (int m = 0; m < MATRICES; ++m) {
        if (work.first_tiles[m] < work.first_tiles[m + 1]) narrows[m] = narrow(work.first_tiles[m]);
      }
#pragma unroll 1
      for (int c = 0; c < columns_left; c += COLUMNS) {
        bool is_pack = c + g * PACK < columns_left;
        int64_t at = int64_t{row + 2 * q} * work.width + first + c + g * PACK;
        auto is_there = [&](int r) { return is_pack && row + 2 * q + r < end; };
        Eight loaded[MATRICES][2];
#pragma unroll
        for (int m = 0; m < MATRICES; ++m) {
          for (int r = 0; r < 2; ++r) {
            loaded[m][r] = load_up_to<true, PACK>(work.inputs[m] + at + r * work.width, is_there(r) ? PACK : 0);
          }
        }
        float sums[MATRICES][4][4];
#pragma unroll
        for (int m = 0; m < MATRICES; ++m) {
          for (int r = 0; r < 2; ++r) {
            for (int k = 0; k < PACK; ++k) ColumnFactors::sum(sums[m], r, k) = to_float(loaded[m][r].at(k));
          }
        }
        __syncwarp();  // lanes that had nothing to store wait for the others
#pragma unroll
        for (int m = 0; m < MATRICES; ++m) {
          int t = work.first_tiles[m], end = work.first_tiles[m + 1];
          auto factors = [&](int t) { return shared + (t * columns + c) * (TILE / QUAD); };
          if (t < end) ColumnFactors::add(sums[m], narrows[m], factors(t));
#pragma unroll 1
          for (++t; t < end; ++t) ColumnFactors::add(sums[m], narrow(t), factors(t));
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (!is_there(r)) continue;
          Pack packs[OUTPUTS];
#pragma unroll
          for (int k = 0; k < PACK; ++k) {
            float gate = ColumnFactors::sum(sums[0], r, k), up = ColumnFactors::sum(sums[1], r, k);
            if constexpr (MATRICES == 3) {
              SwigluGradient gradient = swiglu_gradient(ColumnFactors::sum(sums[2], r, k), gate, up);
              packs[0].at[k] = gradient.gate;
              packs[1].at[k] = gradient.up;
            }
            if constexpr (OUTPUTS != 2) packs[OUTPUTS - 1].at[k] = swiglu_value(gate, up);
          }
#pragma unroll
          for (int i = 0; i < OUTPUTS; ++i) {
            store_pack<true>(work.outputs[i] + at + r * work.width, packs[i], PACK);
          }
        }
      }
    }
  }
}

template <int MATRICES, int OUTPUTS>
void launch_updated(const char* op, const Updated (&inputs)[MATRICES], Bf16* const (&outputs)[OUTPUTS], int64_t tokens,
                    int64_t width, cudaStream_t stream) {
  Matrices<MATRICES, OUTPUTS> work{};
  int num_tiles = 0;
  for (int m = 0; m < MATRICES; ++m) {
    work.inputs[m] = inputs[m].data;
    work.first_tiles[m] = num_tiles;
    for (const LowRankTerm& term : inputs[m].terms) {
      for_each_tile(term, [&](RankTile tile) { work.tiles[num_tiles++] = tile; });
    }
  }
  work.first_tiles[MATRICES] = num_tiles;
  for (int i = 0; i < OUTPUTS; ++i) work.outputs[i] = outputs[i];
  work.tokens = tokens;
  work.width = width;
  work.columns_of_block = CHUNK;
  while (work.columns_of_block * num_tiles > CHUNK * GROUP) work.columns_of_block /= 2;
  work.column_blocks = static_cast<int>(blocks_of(width, work.columns_of_block));
  work.row_blocks = static_cast<int>(blocks_of(tokens, ROWS));
  unsigned blocks = blocks_for(int64_t{work.row_blocks} * work.column_blocks, 1);
  launch(op, &updated_swiglu_kernel<MATRICES, OUTPUTS>, blocks, THREADS, stream, work);
}

}  // namespace

void updated_swiglu(const Updated& gate, const Updated& up, Bf16* y, int64_t tokens, int64_t width,
                    cudaStream_t stream) {
  launch_updated<2, 1>("updated_swiglu", {gate, up}, {y}, tokens, width, stream);
}

void updated_swiglu_backward(const Updated& gate, const Updated& up, const Updated& dy, Bf16* dgate, Bf16* dup,
                             Bf16* y, int64_t tokens, int64_t width, cudaStream_t stream) {
  constexpr const char* OP = "updated_swiglu_backward";
  if (y == nullptr) {
    launch_updated<3, 2>(OP, {gate, up, dy}, {dgate, dup}, tokens, width, stream);
  } else {
    launch_updated<3, 3>(OP, {gate, up, dy}, {dgate, dup, y}, tokens, width, stream);
  }
}

}  // namespace minift::cuda
