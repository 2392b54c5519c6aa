// Tensors as launchers of low-rank products take them.

#pragma once

#include "../low_rank_tensors.h"
#include "low_rank_kernels.h"
#include "tensors.h"

namespace minift::cuda {

inline Bf16* elements(const Tensor& tensor) { return static_cast<Bf16*>(tensor.data_ptr()); }

inline Wide wide_of(const Tensor& tensor) { return {elements(tensor), tensor.stride(0), tensor.size(1)}; }

// What kernels read: the tensors, or copies of those whose layout they do not know, which live as long as this.
class LowRankOperands {
 public:
  Wide with_rows(const Tensor& wide) {
    kept_.push_back(with_adjacent_columns(wide));
    return wide_of(kept_.back());
  }

  const Bf16* bias(const Tensor& bias) {
    kept_.push_back(torch::stable::contiguous(bias));
    return bias.numel() > 0 ? elements(kept_.back()) : nullptr;
  }

  LowRankTerm term(Bf16* narrow, int64_t narrow_stride, const Tensor& factor, double scale) {
    bool adjacent_rows = factor.stride(0) == 1 || factor.size(0) == 1;
    kept_.push_back(adjacent_rows ? factor : with_adjacent_columns(factor));
    const Tensor& kept = kept_.back();
    bool ranks_adjacent = kept.stride(1) == 1;
    return {narrow, narrow_stride, factor.size(1), elements(kept), kept.stride(ranks_adjacent ? 0 : 1),
            ranks_adjacent, static_cast<float>(scale)};
  }

  LowRankTerm term(const Tensor& narrow, const Tensor& factor) {
    kept_.push_back(with_adjacent_columns(narrow));
    Bf16* data = elements(kept_.back());
    int64_t stride = kept_.back().stride(0);
    return term(data, stride, factor, 1.0);
  }

 private:
  Tensors kept_;
};

}  // namespace minift::cuda
