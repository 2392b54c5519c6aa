// RMS normalisation on the CPU: x (..., D) with strided rows allowed, weight (D).

#include "../rms_norm_tensors.h"
#include "instruction_set.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#define MINIFT_KERNELS "rms_norm_kernels.h"
#include "for_each_instruction_set.h"

namespace minift {
namespace {

// The sum over rows for dweight is cut into at most this many blocks, a function of the number of rows alone: the
// result is then bitwise the same with any number of threads.
constexpr int64_t MAX_DWEIGHT_BLOCKS = 64, MIN_DWEIGHT_BLOCK_ROWS = 32;

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  check_rms_norm(x, weight);
  Tensor x_rows = with_rows(x), weight_row = torch::stable::contiguous(weight), y = new_like(x), rstd = new_rstd(x);
  dispatch_dtype(x, "rms_norm", [&](auto element) {
    using T = decltype(element);
    Rows<const T> in = rows<const T>(x_rows);
    Rows<T> out = rows<T>(y);
    const T* w = static_cast<const T*>(weight_row.data_ptr());
    float* scale = static_cast<float*>(rstd.data_ptr());
    auto* kernel = MINIFT_KERNEL(rms_norm<T>);
    parallel_rows(in.count, in.width, [&](int64_t begin, int64_t end) {
      kernel(in, w, static_cast<float>(eps), out, scale, begin, end);
    });
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd, const std::optional<Tensor>& dresidual,
                                             bool need_dweight) {
  check_rms_norm_backward(dy, x, weight, rstd, dresidual);
  Tensor dy_rows = with_rows(dy), x_rows = with_rows(x), weight_row = torch::stable::contiguous(weight);
  std::optional<Tensor> residual_rows;
  if (dresidual) residual_rows = with_rows(*dresidual);
  int64_t width = weight.size(0), count = rstd.numel();
  int64_t block_rows = std::max(MIN_DWEIGHT_BLOCK_ROWS, (count + MAX_DWEIGHT_BLOCKS - 1) / MAX_DWEIGHT_BLOCKS);
  int64_t num_blocks = need_dweight ? (count + block_rows - 1) / block_rows : 0;
  Tensor dx = new_like(x);
  Tensor dweight = torch::stable::new_zeros(x, {need_dweight ? width : 0}, ScalarType::Float);
  Tensor partial_sums = torch::stable::new_empty(x, {num_blocks, width}, ScalarType::Float);
  float* total = static_cast<float*>(dweight.data_ptr());
  float* partial = static_cast<float*>(partial_sums.data_ptr());

  dispatch_dtype(x, "rms_norm_backward", [&](auto element) {
    using T = decltype(element);
    Rows<const T> d = rows<const T>(dy_rows), in = rows<const T>(x_rows);
    Rows<const T> added = residual_rows ? rows<const T>(*residual_rows) : Rows<const T>{};
    Rows<T> out = rows<T>(dx);
    const T* w = static_cast<const T*>(weight_row.data_ptr());
    const float* scale = static_cast<const float*>(rstd.data_ptr());
    if (!need_dweight) {
      auto* kernel = MINIFT_KERNEL(rms_norm_backward<T, false>);
      parallel_rows(count, width, [&](int64_t begin, int64_t end) {
        kernel(d, in, w, scale, added, out, nullptr, begin, end);
      });
      return;
    }
    auto* kernel = MINIFT_KERNEL(rms_norm_backward<T, true>);
    parallel_rows(num_blocks, block_rows * width, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        int64_t first = block * block_rows, last = std::min(first + block_rows, count);
        kernel(d, in, w, scale, added, out, partial + block * width, first, last);
      }
    });
  });
  for (int64_t block = 0; block < num_blocks; ++block) {
    for (int64_t i = 0; i < width; ++i) total[i] += partial[block * width + i];
  }
  return {dx, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
}

}  // namespace minift
