// Quantising to NF4 and back on the GPU; flat contiguous tensors. The format: nf4.h.

#include "../nf4_tensors.h"

#include "nf4_kernels.h"
#include "tensors.h"

#include <optional>
#include <tuple>

namespace minift::cuda {
namespace {

// absmax, and codes if `codes` is not null.
Tensor quantize(const Tensor& weight, int64_t block_size, Tensor* codes) {
  Tensor flat = torch::stable::contiguous(weight);
  int64_t n = weight.numel();
  Tensor absmax = torch::stable::new_empty(weight, {(n + block_size - 1) / block_size}, ScalarType::Float);
  OnDevice on(weight);
  dispatch_dtype(weight, "nf4_quantize", [&](auto element) {
    using T = decltype(element);
    nf4_quantize(static_cast<const T*>(flat.data_ptr()), n, block_size,
                 codes == nullptr ? nullptr : static_cast<uint8_t*>(codes->data_ptr()),
                 static_cast<float*>(absmax.data_ptr()), on.stream);
  });
  return absmax;
}

Tensor nf4_absmax(const Tensor& weight, int64_t block_size) {
  check_nf4_block_size("nf4_absmax", block_size);
  return quantize(weight, block_size, nullptr);
}

std::tuple<Tensor, Tensor> nf4_quantize_op(const Tensor& weight, int64_t block_size) {
  check_nf4_block_size("nf4_quantize", block_size);
  Tensor codes = torch::stable::new_empty(weight, {(weight.numel() + 1) / 2}, ScalarType::Byte);
  Tensor absmax = quantize(weight, block_size, &codes);
  return {codes, absmax};
}

void nf4_dequantize_op(const Tensor& out, const Tensor& codes, const Tensor& scales,
                       const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& offset,
                       const std::optional<Tensor>& nested_map, int64_t block_size, int64_t start, int64_t stride) {
  nf4::Scales block_scales = nf4_scales(scales, nested_absmax, offset, nested_map);
  check_nf4_rows(out, codes, scales, block_size, start, stride);
  OnDevice on(out, codes, scales, nested_absmax, offset, nested_map);
  dispatch_dtype(out, "nf4_dequantize", [&](auto element) {
    using T = decltype(element);
    nf4_dequantize(nf4_codes(codes), block_scales, block_size, static_cast<T*>(out.data_ptr()), out.size(0),
                   out.size(1), start, stride, on.stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, MINIFT_CUDA_KEY, m) {
  m.impl("nf4_absmax", TORCH_BOX(&nf4_absmax));
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize_op));
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize_op));
}

}  // namespace minift::cuda
