// Elementwise kernels: a function of packs at the same place of several tensors, whose rows may be strided.

#pragma once

#include "elements.h"
#include "launch.h"

namespace minift::cuda {

constexpr int ELEMENTWISE_THREADS = 256;
constexpr int ELEMENTWISE_UNROLLED = 2;  // packs of a thread that are loaded before the first is computed

// Tensors of one shape.
template <class T, int INPUTS, int OUTPUTS>
struct Elementwise {
  Rows<const T> inputs[INPUTS];
  Rows<T> outputs[OUTPUTS];
};

// VECTOR: every row is aligned and made of whole packs.
template <bool VECTOR, class Function, class T, int INPUTS, int OUTPUTS>
__global__ void __launch_bounds__(ELEMENTWISE_THREADS)
    elementwise(const __grid_constant__ Elementwise<T, INPUTS, OUTPUTS> tensors, Function function) {
  int64_t count = tensors.inputs[0].count, width = tensors.inputs[0].width;
  int64_t packs_per_row = (width + PACK - 1) / PACK, num_packs = count * packs_per_row;
  int64_t step = ELEMENTWISE_THREADS * ELEMENTWISE_UNROLLED;
  for (int64_t first = blockIdx.x * step + threadIdx.x; first < num_packs; first += gridDim.x * step) {
    PackOf<T> loaded[ELEMENTWISE_UNROLLED][INPUTS];
    int64_t rows[ELEMENTWISE_UNROLLED], columns[ELEMENTWISE_UNROLLED];
#pragma unroll
    for (int u = 0; u < ELEMENTWISE_UNROLLED; ++u) {
      // What would be past the end is the first once more: no branch stands between the loads, and where a result takes
      // the place of an operand, nobody reads what another thread may be writing.
      int64_t pack = first + u * ELEMENTWISE_THREADS < num_packs ? first + u * ELEMENTWISE_THREADS : first;
      rows[u] = count == 1 ? 0 : pack / packs_per_row;
      columns[u] = (pack - rows[u] * packs_per_row) * PACK;
#pragma unroll
      for (int i = 0; i < INPUTS; ++i) {
        const T* from = tensors.inputs[i][rows[u]] + columns[u];
        loaded[u][i] = load_elements<VECTOR>(from, VECTOR ? PACK : width - columns[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < ELEMENTWISE_UNROLLED; ++u) {
      if (first + u * ELEMENTWISE_THREADS >= num_packs) break;
      Pack inputs[INPUTS], outputs[OUTPUTS];
#pragma unroll
      for (int i = 0; i < INPUTS; ++i) inputs[i] = to_floats(loaded[u][i]);
      function(rows[u] * width + columns[u], inputs, outputs);
#pragma unroll
      for (int i = 0; i < OUTPUTS; ++i) {
        T* to = tensors.outputs[i][rows[u]] + columns[u];
        store_pack<VECTOR>(to, outputs[i], VECTOR ? PACK : width - columns[u]);
      }
    }
  }
}

// function(element, inputs, outputs): `element` is the number of the pack's first element, counted along rows.
template <class Function, class T, int INPUTS, int OUTPUTS>
void launch_elementwise(const char* op, Elementwise<T, INPUTS, OUTPUTS> tensors, Function function,
                        cudaStream_t stream) {
  bool contiguous = true, vector = true;
  auto for_each = [&](auto&& visit) {
    for (auto& rows : tensors.inputs) visit(rows);
    for (auto& rows : tensors.outputs) visit(rows);
  };
  for_each([&](auto& rows) { contiguous &= rows.contiguous(); });
  for_each([&](auto& rows) {
    int64_t elements = rows.count * rows.width;
    if (contiguous) rows = {rows.data, 1, elements, 1, elements, elements};
    vector &= aligned(rows);
  });
  int64_t packs_per_row = (tensors.inputs[0].width + PACK - 1) / PACK;
  unsigned blocks = blocks_for(tensors.inputs[0].count * packs_per_row, ELEMENTWISE_THREADS * ELEMENTWISE_UNROLLED);
  auto* kernel = vector ? &elementwise<true, Function, T, INPUTS, OUTPUTS>
                        : &elementwise<false, Function, T, INPUTS, OUTPUTS>;
  launch(op, kernel, blocks, ELEMENTWISE_THREADS, stream, tensors, function);
}

}  // namespace minift::cuda
