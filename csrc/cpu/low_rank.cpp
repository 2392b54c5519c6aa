// Low-rank updates on the CPU, in bf16: wide matrices (T, W), narrow ones (T, R), factors (W, R).
//
// What is small, a factor or a narrow matrix, is first packed into a panel by the calling thread. Then rows, or strips
// of a wide matrix, are each computed by one thread, in the same way whichever it is: results have the same bits with
// any number of threads.

#include "../low_rank_tensors.h"
#include "instruction_set.h"
#include "parallel.h"

#include "low_rank.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#define MINIFT_KERNELS "low_rank_kernels.h"
#include "for_each_instruction_set.h"

namespace minift {
namespace {

// A matrix (length, width) that rows of `length` elements are multiplied by; see low_rank_kernels.h.
class Panel {
 public:
  Panel(const Tensor& matrix, int64_t length_dim)
      : width((matrix.size(1 - length_dim) + LOW_RANK_PADDING - 1) / LOW_RANK_PADDING * LOW_RANK_PADDING),
        pairs_((matrix.size(length_dim) + 1) / 2 * width) {
    MINIFT_KERNEL(pack_low_rank)(static_cast<const Bf16*>(matrix.data_ptr()), matrix.stride(length_dim),
                                 matrix.stride(1 - length_dim), matrix.size(length_dim), matrix.size(1 - length_dim),
                                 pairs_.data(), width);
  }
  const uint32_t* pairs() const { return pairs_.data(); }

  const int64_t width;

 private:
  std::vector<uint32_t> pairs_;
};

LowRankProduct product_of(const Tensor& rows, const Panel& panel) {
  return {static_cast<const Bf16*>(rows.data_ptr()), rows.stride(0), rows.size(1), panel.pairs()};
}

// Every sum, rows in parallel.
void compute(const std::vector<LowRankSum>& sums, int64_t tokens) {
  auto* kernel = MINIFT_KERNEL(low_rank_multiply);
  int64_t width = 0, num_blocks = (tokens + LOW_RANK_ROWS - 1) / LOW_RANK_ROWS;
  for (const LowRankSum& sum : sums) width += sum.width + sum.products[0].length;
  parallel_rows(num_blocks, LOW_RANK_ROWS * width, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      int64_t row = block * LOW_RANK_ROWS;
      for (const LowRankSum& sum : sums) kernel(sum, row, std::min(row + LOW_RANK_ROWS, tokens));
    }
  });
}

// [scale_0 wide_0 F_0, scale_1 wide_1 F_1, ..] side by side.
Tensor to_rank(const Tensors& wides, const Tensors& factors, const std::vector<double>& scales) {
  check_to_rank(wides, factors, scales);
  int64_t tokens = wides[0].size(0), rank = 0;
  Tensors inputs;
  std::vector<Panel> panels;
  for (size_t i = 0; i < factors.size(); ++i) {
    inputs.push_back(with_adjacent_columns(of_factor(wides, i)));
    panels.emplace_back(factors[i], 0);
    rank += factors[i].size(1);
  }
  Tensor narrow = torch::stable::new_empty(wides[0], {tokens, rank});
  Bf16* out = static_cast<Bf16*>(narrow.data_ptr());
  std::vector<LowRankProduct> products;
  std::vector<LowRankSum> sums;
  for (size_t i = 0; i < factors.size(); ++i) products.push_back(product_of(inputs[i], panels[i]));
  for (size_t i = 0; i < factors.size(); out += factors[i++].size(1)) {
    sums.push_back({&products[i], 1, panels[i].width, factors[i].size(1), static_cast<float>(scales[i]), nullptr,
                    out, rank});
  }
  compute(sums, tokens);
  return narrow;
}

// Of each wide matrix its bias and the sum of narrow_j F_j^T over its `counts[i]` terms.
Tensors from_rank(const Tensors& narrows, const Tensors& factors, const std::vector<int64_t>& counts,
                  const Tensors& biases) {
  check_from_rank(narrows, factors, counts, biases);
  int64_t tokens = narrows[0].size(0);
  Tensors inputs, wides;
  std::vector<Panel> panels;
  std::vector<LowRankProduct> products;
  for (size_t j = 0; j < factors.size(); ++j) {
    inputs.push_back(with_adjacent_columns(narrows[j]));
    panels.emplace_back(factors[j], 1);
  }
  for (size_t j = 0; j < factors.size(); ++j) products.push_back(product_of(inputs[j], panels[j]));
  std::vector<LowRankSum> sums;
  Tensors adjacent_biases;
  for (size_t i = 0, first = 0; i < counts.size(); first += counts[i++]) {
    int64_t width = factors[first].size(0);
    Tensor wide = torch::stable::new_empty(narrows[0], {tokens, width});
    const Tensor& bias = adjacent_biases.emplace_back(torch::stable::contiguous(biases[i]));
    sums.push_back({&products[first], counts[i], panels[first].width, width, 1.0f,
                    bias.numel() ? static_cast<const Bf16*>(bias.data_ptr()) : nullptr,
                    static_cast<Bf16*>(wide.data_ptr()), width});
    wides.push_back(wide);
  }
  compute(sums, tokens);
  return wides;
}

// gradient_i = wide_i^T narrow_i, (width, rank).
void factor_gradients_(const Tensors& gradients, const Tensors& wides, const Tensors& narrows) {
  check_factor_gradients(gradients, wides, narrows);
  int64_t tokens = wides[0].size(0);
  struct Strip { size_t factor; int64_t begin; };
  std::vector<Strip> strips;
  Tensors inputs;
  std::vector<Panel> panels;
  int64_t most_sums = 0;
  for (size_t i = 0; i < gradients.size(); ++i) {
    int64_t width = of_factor(wides, i).size(1);
    inputs.push_back(with_adjacent_columns(of_factor(wides, i)));
    panels.emplace_back(narrows[i], 0);
    most_sums = std::max(most_sums, panels[i].width * GRADIENT_STRIP);
    for (int64_t begin = 0; begin < width; begin += GRADIENT_STRIP) strips.push_back({i, begin});
  }
  auto* sum_up = MINIFT_KERNEL(low_rank_gradient);
  auto compute_strip = [&](Strip strip, float* sums) {
    const Tensor &wide = inputs[strip.factor], &gradient = gradients[strip.factor];
    const Panel& narrow = panels[strip.factor];
    int64_t rank = gradient.size(1), width = std::min(GRADIENT_STRIP, wide.size(1) - strip.begin);
    sum_up(static_cast<const Bf16*>(wide.data_ptr()) + strip.begin, wide.stride(0), tokens, width, narrow.pairs(),
           narrow.width, rank, sums);
    dispatch_dtype(gradient, "factor_gradients_", [&](auto element) {
      using T = decltype(element);
      T* out = static_cast<T*>(gradient.data_ptr()) + strip.begin * gradient.stride(0);
      MINIFT_KERNEL(store_low_rank_gradient<T>)(sums, rank, width, out, gradient.stride(0), gradient.stride(1));
    });
  };
  parallel_rows(strips.size(), std::max<int64_t>(1, tokens) * GRADIENT_STRIP, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(most_sums);
    for (int64_t strip = begin; strip < end; ++strip) compute_strip(strips[strip], sums.data());
  });
}

Tensor to_rank_and_gradients_(const Tensors& wides, const Tensors& factors, const std::vector<double>& scales,
                              const Tensors& narrows, const Tensors& gradients) {
  check_to_rank_and_gradients(wides, factors, scales, narrows, gradients);
  factor_gradients_(gradients, wides, narrows);
  return to_rank(wides, factors, scales);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, CPU, m) {
  m.impl("to_rank", TORCH_BOX(&to_rank));
  m.impl("from_rank", TORCH_BOX(&from_rank));
  m.impl("factor_gradients_", TORCH_BOX(&factor_gradients_));
  m.impl("to_rank_and_gradients_", TORCH_BOX(&to_rank_and_gradients_));
}

}  // namespace minift
