// SwiGLU on the GPU of a gate and an up that lack their low-rank updates, in bf16.

#include "../swiglu_tensors.h"

#include "low_rank_terms.h"
#include "updated_swiglu_kernels.h"

#include <array>
#include <tuple>

namespace minift::cuda {
namespace {

using Counts = std::vector<int64_t>;

bool is_aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0; }

void check_matrix(const Tensor& matrix) {
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.scalar_type() == ScalarType::BFloat16 && matrix.is_contiguous() &&
                      matrix.size(1) % 8 == 0 && is_aligned(matrix),
                  "updated_swiglu: gate, up and dy must be contiguous bfloat16 (tokens, width), aligned to 16 bytes, "
                  "of a width that is a multiple of 8");
}

// As kernels read it: itself, if its rows or its columns are adjacent and packs of the others aligned, or a copy.
// Parameters are parts of a larger buffer and may begin anywhere there.
Tensor itself_or_in_packs(const Tensor& matrix) {
  int64_t apart = matrix.stride(matrix.stride(1) == 1 ? 0 : 1);
  bool adjacent = matrix.stride(0) == 1 || matrix.stride(1) == 1;
  if (adjacent && apart % 8 == 0 && is_aligned(matrix)) return matrix;
  Tensor copy = new_like(matrix);
  torch::stable::copy_(copy, matrix);
  return copy;
}

// The matrices, each with its counts[i] terms.
template <size_t N>
std::array<Updated, N> updated(const std::array<const Tensor*, N>& matrices, const Tensors& narrows,
                               const Tensors& factors, const Counts& counts, LowRankOperands& operands) {
  STD_TORCH_CHECK(counts.size() == N && narrows.size() == factors.size(),
                  "updated_swiglu: there must be a count for each matrix, and a factor for each narrow one");
  for (const Tensor* matrix : matrices) check_matrix(*matrix);
  int64_t tokens = matrices[0]->size(0), width = matrices[0]->size(1);
  std::array<Updated, N> all;
  size_t j = 0;
  for (size_t i = 0; i < N; ++i) {
    STD_TORCH_CHECK(counts[i] >= 0, "updated_swiglu: a count is negative");
    all[i].data = elements(*matrices[i]);
    int64_t tiles = 0;
    for (int64_t count = counts[i]; count > 0; --count, ++j) {
      STD_TORCH_CHECK(j < narrows.size(), "updated_swiglu: fewer terms than counted");
      check_factor(factors[j], width);
      int64_t rank = factors[j].size(1);
      check_narrow(narrows[j], tokens, rank);
      STD_TORCH_CHECK(rank % 8 == 0, "updated_swiglu: ranks must be multiples of 8");
      all[i].terms.push_back(operands.term(itself_or_in_packs(narrows[j]), itself_or_in_packs(factors[j])));
      tiles += (rank + RANK_TILE - 1) / RANK_TILE;
    }
    STD_TORCH_CHECK(tiles <= MOST_UPDATE_TILES, "updated_swiglu: too many ranks of one matrix");
  }
  STD_TORCH_CHECK(j == narrows.size(), "updated_swiglu: more terms than counted");
  return all;
}

Tensor updated_swiglu_op(const Tensor& gate, const Tensor& up, const Tensors& narrows, const Tensors& factors,
                         const Counts& counts) {
  check_swiglu(gate, up);
  OnDevice on(gate, up, narrows, factors);
  LowRankOperands operands;
  auto [of_gate, of_up] = updated<2>({&gate, &up}, narrows, factors, counts, operands);
  Tensor y = new_like(gate);
  updated_swiglu(of_gate, of_up, elements(y), gate.size(0), gate.size(1), on.stream);
  return y;
}

std::tuple<Tensor, Tensor> updated_swiglu_backward_op(const Tensor& dy, const Tensor& gate, const Tensor& up,
                                                      const Tensors& narrows, const Tensors& factors,
                                                      const Counts& counts, bool need_y) {
  check_swiglu_backward_in_place(dy, gate, up);
  OnDevice on(gate, up, dy, narrows, factors);
  LowRankOperands operands;
  auto [of_gate, of_up, of_dy] = updated<3>({&gate, &up, &dy}, narrows, factors, counts, operands);
  Tensor dup = new_like(gate), y = y_if(need_y, gate);
  updated_swiglu_backward(of_gate, of_up, of_dy, elements(dy), elements(dup), need_y ? elements(y) : nullptr,
                          gate.size(0), gate.size(1), on.stream);
  return {dup, y};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, MINIFT_CUDA_KEY, m) {
  m.impl("updated_swiglu", TORCH_BOX(&updated_swiglu_op));
  m.impl("updated_swiglu_backward_", TORCH_BOX(&updated_swiglu_backward_op));
}

}  // namespace minift::cuda
