// RMS normalisation on the GPU: x (..., D) with strided rows allowed, weight (D).

#include "../rms_norm_tensors.h"

#include "rms_norm_kernels.h"
#include "tensors.h"

#include <optional>
#include <tuple>

namespace minift::cuda {
namespace {

std::tuple<Tensor, Tensor> rms_norm_op(const Tensor& x, const Tensor& weight, double eps) {
  check_rms_norm(x, weight);
  OnDevice on(x, weight);
  Tensor x_rows = with_rows(x), weight_row = torch::stable::contiguous(weight), y = new_like(x), rstd = new_rstd(x);
  dispatch_dtype(x, "rms_norm", [&](auto element) {
    using T = decltype(element);
    rms_norm(rows<const T>(x_rows), static_cast<const T*>(weight_row.data_ptr()), static_cast<float>(eps),
             static_cast<T*>(y.data_ptr()), static_cast<float*>(rstd.data_ptr()), on.stream);
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward_op(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                const Tensor& rstd, const std::optional<Tensor>& dresidual,
                                                bool need_dweight) {
  check_rms_norm_backward(dy, x, weight, rstd, dresidual);
  OnDevice on(x, dy, weight, rstd, dresidual);
  Tensor dy_rows = with_rows(dy), x_rows = with_rows(x), weight_row = torch::stable::contiguous(weight);
  std::optional<Tensor> residual_rows;
  if (dresidual) residual_rows = with_rows(*dresidual);
  int64_t width = need_dweight ? weight.size(0) : 0;
  int64_t num_parts = need_dweight ? rms_norm_dweight_parts(rstd.numel(), width) : 0;
  Tensor dx = new_like(x), dweight = torch::stable::new_empty(x, {width}, ScalarType::Float);
  Tensor parts = torch::stable::new_empty(x, {num_parts, width}, ScalarType::Float);
  dispatch_dtype(x, "rms_norm_backward", [&](auto element) {
    using T = decltype(element);
    rms_norm_backward(rows<const T>(dy_rows), rows<const T>(x_rows), static_cast<const T*>(weight_row.data_ptr()),
                      static_cast<const float*>(rstd.data_ptr()),
                      residual_rows ? rows<const T>(*residual_rows) : Rows<const T>{},
                      static_cast<T*>(dx.data_ptr()),
                      need_dweight ? static_cast<float*>(dweight.data_ptr()) : nullptr,
                      static_cast<float*>(parts.data_ptr()), on.stream);
  });
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, MINIFT_CUDA_KEY, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_op));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward_op));
}

}  // namespace minift::cuda
