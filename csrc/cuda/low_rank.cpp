// Low-rank updates on the GPU, in bf16: wide matrices (T, W), narrow ones (T, R), factors (W, R).

#include "../low_rank_tensors.h"

#include "low_rank_both_kernels.h"
#include "low_rank_gradient_kernels.h"
#include "low_rank_terms.h"

namespace minift::cuda {
namespace {

Tensor to_rank_op(const Tensors& wides, const Tensors& factors, const std::vector<double>& scales) {
  check_to_rank(wides, factors, scales);
  int64_t tokens = wides[0].size(0), rank = 0, column = 0;
  for (const Tensor& factor : factors) rank += factor.size(1);
  OnDevice on(wides[0], wides, factors);
  Tensor narrow = torch::stable::new_empty(wides[0], {tokens, rank});
  LowRankOperands operands;
  std::vector<LowRankGroup> groups;
  for (const Tensor& wide : wides) groups.push_back({operands.with_rows(wide), nullptr, {}});
  for (size_t i = 0; i < factors.size(); column += factors[i++].size(1)) {
    LowRankTerm term = operands.term(elements(narrow) + column, rank, factors[i], scales[i]);
    groups[wides.size() == 1 ? 0 : i].terms.push_back(term);
  }
  int64_t splits = to_rank_splits(groups, tokens);
  Tensor sums = torch::stable::new_empty(narrow, {splits > 1 ? splits * tokens * rank : 0}, ScalarType::Float);
  to_rank(groups, tokens, elements(narrow), rank, splits, static_cast<float*>(sums.data_ptr()), on.stream);
  return narrow;
}

Tensors from_rank_op(const Tensors& narrows, const Tensors& factors, const std::vector<int64_t>& counts,
                     const Tensors& biases) {
  check_from_rank(narrows, factors, counts, biases);
  OnDevice on(narrows[0], narrows, factors, biases);
  int64_t tokens = narrows[0].size(0);
  LowRankOperands operands;
  std::vector<LowRankGroup> groups;
  Tensors wides;
  for (size_t i = 0, j = 0; i < counts.size(); ++i) {
    wides.push_back(torch::stable::new_empty(narrows[0], {tokens, factors[j].size(0)}));
    groups.push_back({wide_of(wides.back()), operands.bias(biases[i]), {}});
    int64_t tiles = 0;
    for (size_t end = j + counts[i]; j < end; ++j) {
      groups.back().terms.push_back(operands.term(narrows[j], factors[j]));
      tiles += (factors[j].size(1) + RANK_TILE - 1) / RANK_TILE;
    }
    STD_TORCH_CHECK(tiles <= FROM_RANK_TILES, "from_rank: too many terms of one wide matrix");
  }
  from_rank(groups, tokens, on.stream);
  return wides;
}

ElementType type_of(const Tensor& gradient) {
  return dispatch_dtype(gradient, "factor_gradients_", [](auto element) {
    using T = decltype(element);
    if (std::is_same_v<T, float>) return ElementType::FLOAT;
    return std::is_same_v<T, Bf16> ? ElementType::BF16 : ElementType::FP16;
  });
}

Tensors all_with_adjacent_columns(const Tensors& tensors) {
  Tensors rows;
  for (const Tensor& tensor : tensors) rows.push_back(with_adjacent_columns(tensor));
  return rows;
}

FactorGradient gradient_of(const Tensor& wide, const Tensor& narrow, const Tensor& gradient) {
  return {wide_of(wide),       elements(narrow),  narrow.stride(0),   narrow.size(1),
          gradient.data_ptr(), type_of(gradient), gradient.stride(0), gradient.stride(1)};
}

void factor_gradients_op(const Tensors& gradients, const Tensors& wides, const Tensors& narrows) {
  check_factor_gradients(gradients, wides, narrows);
  OnDevice on(wides[0], wides, narrows, gradients);
  Tensors wide_rows = all_with_adjacent_columns(wides), narrow_rows = all_with_adjacent_columns(narrows);
  std::vector<FactorGradient> terms;
  int64_t tokens = wides[0].size(0), numel = 0;
  for (size_t i = 0; i < gradients.size(); ++i) {
    terms.push_back(gradient_of(of_factor(wide_rows, i), narrow_rows[i], gradients[i]));
    numel += gradients[i].numel();
  }
  int64_t splits = gradient_splits(terms, tokens);
  Tensor sums = torch::stable::new_empty(wides[0], {splits * numel}, ScalarType::Float);
  factor_gradients(terms, tokens, splits, static_cast<float*>(sums.data_ptr()), on.stream);
}

Tensor to_rank_and_gradients_op(const Tensors& wides, const Tensors& factors, const std::vector<double>& scales,
                                const Tensors& narrows, const Tensors& gradients) {
  check_to_rank_and_gradients(wides, factors, scales, narrows, gradients);
  OnDevice on(wides[0], wides, factors, narrows, gradients);
  Tensors wide_rows = all_with_adjacent_columns(wides), narrow_rows = all_with_adjacent_columns(narrows);
  std::vector<RankAndGradient> terms;
  int64_t tokens = wides[0].size(0), rank = 0;
  for (size_t i = 0; i < factors.size(); ++i) {
    terms.push_back({gradient_of(of_factor(wide_rows, i), narrow_rows[i], gradients[i]), elements(factors[i]),
                     factors[i].stride(0), factors[i].stride(1), static_cast<float>(scales[i])});
    rank += factors[i].size(1);
  }
  if (!is_one_pass(terms)) {
    factor_gradients_op(gradients, wide_rows, narrow_rows);
    return to_rank_op(wide_rows, factors, scales);
  }
  Tensor narrow = torch::stable::new_empty(wides[0], {tokens, rank});
  Tensor sums = torch::stable::new_empty(narrow, {one_pass_sums(terms, tokens)}, ScalarType::Float);
  to_rank_and_gradients(terms, tokens, elements(narrow), static_cast<float*>(sums.data_ptr()), on.stream);
  return narrow;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, MINIFT_CUDA_KEY, m) {
  m.impl("to_rank", TORCH_BOX(&to_rank_op));
  m.impl("from_rank", TORCH_BOX(&from_rank_op));
  m.impl("factor_gradients_", TORCH_BOX(&factor_gradients_op));
  m.impl("to_rank_and_gradients_", TORCH_BOX(&to_rank_and_gradients_op));
}

}  // namespace minift::cuda
