// Between tensors and the low-rank products of every device: checks. Wide (T, W), narrow (T, R), factors (W, R), bf16.

#pragma once

#include "tensors.h"

#include <vector>

namespace minift {

using Tensors = std::vector<Tensor>;

inline const Tensor& of_factor(const Tensors& wides, size_t i) { return wides[wides.size() == 1 ? 0 : i]; }

inline bool is_matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns;
}

inline void check_wides(const Tensors& wides, size_t num_factors) {
  STD_TORCH_CHECK(num_factors > 0 && (wides.size() == num_factors || wides.size() == 1),
                  "low rank: there must be a wide matrix for each factor, or one for all");
  for (const Tensor& wide : wides) {
    STD_TORCH_CHECK(wide.dim() == 2 && wide.size(0) == wides[0].size(0) &&
                        wide.scalar_type() == ScalarType::BFloat16,
                    "low rank: wide matrices must be bfloat16 (tokens, width)");
  }
}

inline Tensor with_adjacent_columns(const Tensor& tensor) {
  return tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline void check_factor(const Tensor& factor, int64_t width) {
  STD_TORCH_CHECK(factor.dim() == 2 && factor.size(0) == width && factor.scalar_type() == ScalarType::BFloat16,
                  "low rank: factors must be bfloat16 (width, rank)");
}

inline void check_narrow(const Tensor& narrow, int64_t tokens, int64_t rank) {
  STD_TORCH_CHECK(is_matrix(narrow, tokens, rank) && narrow.scalar_type() == ScalarType::BFloat16,
                  "low rank: narrow matrices must be bfloat16 (tokens, rank)");
}

inline void check_to_rank(const Tensors& wides, const Tensors& factors, const std::vector<double>& scales) {
  check_wides(wides, factors.size());
  for (size_t i = 0; i < factors.size(); ++i) check_factor(factors[i], of_factor(wides, i).size(1));
  STD_TORCH_CHECK(scales.size() == factors.size(), "to_rank: there must be a scale for each factor");
}

inline void check_from_rank(const Tensors& narrows, const Tensors& factors, const std::vector<int64_t>& counts,
                            const Tensors& biases) {
  STD_TORCH_CHECK(biases.size() == counts.size(), "from_rank: there must be a bias for each wide matrix");
  size_t first = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    int64_t count = counts[i];
    STD_TORCH_CHECK(count > 0 && first + count <= factors.size() && first + count <= narrows.size(),
                    "from_rank: every wide matrix has at least one term, and there are no more terms than matrices");
    for (size_t j = first; j < first + count; ++j) {
      STD_TORCH_CHECK(factors[j].dim() == 2 && factors[j].size(1) > 0 && narrows[j].dim() == 2,
                      "from_rank: expected matrices, of rank 1 at least");
      check_factor(factors[j], factors[first].size(0));
      check_narrow(narrows[j], narrows[0].size(0), factors[j].size(1));
    }
    STD_TORCH_CHECK(biases[i].dim() == 1 && (biases[i].size(0) == 0 || biases[i].size(0) == factors[first].size(0)) &&
                        biases[i].scalar_type() == ScalarType::BFloat16,
                    "from_rank: biases must be bfloat16 (width) or (0)");
    first += count;
  }
  STD_TORCH_CHECK(first > 0 && first == factors.size() && first == narrows.size(),
                  "from_rank: every narrow matrix and its factor must belong to a wide one");
}

inline void check_factor_gradients(const Tensors& gradients, const Tensors& wides, const Tensors& narrows) {
  check_wides(wides, gradients.size());
  STD_TORCH_CHECK(narrows.size() == gradients.size(), "factor_gradients_: one narrow matrix for each gradient");
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Tensor &wide = of_factor(wides, i), &gradient = gradients[i];
    STD_TORCH_CHECK(gradient.dim() == 2, "factor_gradients_: gradients must be matrices");
    check_narrow(narrows[i], wide.size(0), gradient.size(1));
    STD_TORCH_CHECK(is_matrix(gradient, wide.size(1), narrows[i].size(1)) &&
                        (gradient.stride(0) == 1 || gradient.stride(1) == 1),
                    "factor_gradients_: gradients must be (width, rank), contiguous or the transpose of what is");
  }
}

inline void check_to_rank_and_gradients(const Tensors& wides, const Tensors& factors, const std::vector<double>& scales,
                                        const Tensors& narrows, const Tensors& gradients) {
  check_to_rank(wides, factors, scales);
  check_factor_gradients(gradients, wides, narrows);
  for (size_t i = 0; i < factors.size(); ++i) {
    STD_TORCH_CHECK(factors.size() == gradients.size() && factors[i].size(1) == gradients[i].size(1),
                    "to_rank_and_gradients_: every factor has a gradient, of its shape");
  }
}

}  // namespace minift
