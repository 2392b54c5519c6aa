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

inline void check_factors(const Tensors& wides, const Tensors& factors) {
  for (size_t i = 0; i < factors.size(); ++i) {
    STD_TORCH_CHECK(factors[i].dim() == 2 && factors[i].size(0) == of_factor(wides, i).size(1) &&
                        factors[i].scalar_type() == ScalarType::BFloat16,
                    "low rank: factors must be bfloat16 (width, rank)");
  }
}

inline void check_to_rank(const Tensors& wides, const Tensors& factors, const std::vector<double>& scales) {
  check_wides(wides, factors.size());
  check_factors(wides, factors);
  STD_TORCH_CHECK(scales.size() == factors.size(), "to_rank: there must be a scale for each factor");
}

inline void check_add_from_rank(const Tensors& wides, const Tensors& narrows, const Tensors& factors) {
  check_wides(wides, factors.size());
  check_factors(wides, factors);
  STD_TORCH_CHECK(narrows.size() == factors.size(), "add_from_rank_: there must be a narrow matrix for each factor");
  for (size_t i = 0; i < factors.size(); ++i) {
    STD_TORCH_CHECK(is_matrix(narrows[i], wides[0].size(0), factors[i].size(1)) &&
                        narrows[i].scalar_type() == ScalarType::BFloat16,
                    "add_from_rank_: narrow matrices must be bfloat16 (tokens, rank)");
  }
  for (const Tensor& wide : wides) {
    STD_TORCH_CHECK(wide.stride(1) == 1, "add_from_rank_: the elements of a row must be adjacent");
  }
}

inline void check_factor_gradients(const Tensors& gradients, const Tensors& wides, const Tensors& narrows) {
  check_wides(wides, gradients.size());
  STD_TORCH_CHECK(narrows.size() == gradients.size(), "factor_gradients_: one narrow matrix for each gradient");
  for (size_t i = 0; i < gradients.size(); ++i) {
    const Tensor &wide = of_factor(wides, i), &gradient = gradients[i];
    STD_TORCH_CHECK(gradient.dim() == 2 && is_matrix(narrows[i], wide.size(0), gradient.size(1)) &&
                        narrows[i].scalar_type() == ScalarType::BFloat16,
                    "factor_gradients_: narrow matrices must be bfloat16 (tokens, rank)");
    STD_TORCH_CHECK(is_matrix(gradient, wide.size(1), narrows[i].size(1)) &&
                        (gradient.stride(0) == 1 || gradient.stride(1) == 1),
                    "factor_gradients_: gradients must be (width, rank), contiguous or the transpose of what is");
  }
}

}  // namespace minift
