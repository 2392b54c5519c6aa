// A few tokens times an NF4 matrix on the CPU: x (T, in), W (out, in), y (T, out), and no dequantised copy of W.

#include "../nf4_tensors.h"

#include "instruction_set.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#define MINIFT_KERNELS "nf4_gemv_kernels.h"
#include "for_each_instruction_set.h"

namespace minift {
namespace {

constexpr int64_t LARGEST_CHUNK = 128;  // elements that a kernel takes at once
constexpr int64_t TOKENS_AT_ONCE = 8;   // for which each weight is looked up once

Tensor nf4_gemv(const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& nested_absmax,
                const std::optional<Tensor>& offset, const std::optional<Tensor>& nested_map, int64_t block_size) {
  nf4::Scales block_scales = nf4_scales(scales, nested_absmax, offset, nested_map);
  const uint8_t* bytes = nf4_codes(codes);
  int64_t tokens = x.size(0), width = x.size(1), features = check_nf4_gemv(x, codes, scales, block_size);
  Tensor x_rows = with_rows(x), y = torch::stable::new_empty(x, {tokens, features});
  int64_t padded_width = (width + LARGEST_CHUNK - 1) / LARGEST_CHUNK * LARGEST_CHUNK;
  Tensor ordered = torch::stable::new_empty(x, {TOKENS_AT_ONCE, padded_width}, ScalarType::Int);
  uint32_t* ordered_x = static_cast<uint32_t*>(ordered.data_ptr());
  dispatch_dtype(x, "nf4_gemv", [&](auto element) {
    using T = decltype(element);
    Rows<const T> from = rows<const T>(x_rows);
    T* to = static_cast<T*>(y.data_ptr());
    auto* order = MINIFT_KERNEL(nf4_gemv_order<T>);
    for (int64_t token = 0, count; token < tokens; token += count) {
      int64_t left = tokens - token;
      count = left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      auto* kernel = count == 8   ? MINIFT_KERNEL(nf4_gemv<8, T>)
                     : count == 4 ? MINIFT_KERNEL(nf4_gemv<4, T>)
                     : count == 2 ? MINIFT_KERNEL(nf4_gemv<2, T>)
                                  : MINIFT_KERNEL(nf4_gemv<1, T>);
      for (int64_t t = 0; t < count; ++t) order(from[token + t], width, t, count, ordered_x);
      parallel_rows(features, width, [&](int64_t begin, int64_t end) {
        kernel(ordered_x, width, bytes, block_scales, block_size, to + token * features, features, begin, end);
      });
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, CPU, m) {
  m.impl("nf4_gemv", TORCH_BOX(&nf4_gemv));
}

}  // namespace minift
