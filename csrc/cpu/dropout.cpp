// Dropout with a mask made from a seed and the element's index: x of any shape, rows may be strided.

#include "../dropout_tensors.h"
#include "../random_bits.h"
#include "instruction_set.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>

#define MINIFT_KERNELS "dropout_kernels.h"
#include "for_each_instruction_set.h"

namespace minift {
namespace {

Tensor dropout(const Tensor& x, int64_t seed, int64_t num_dropped) {
  check_dropout(x, num_dropped);
  Tensor x_rows = with_rows(x), y = new_like(x);
  dispatch_dtype(x, "dropout", [&](auto element) {
    using T = decltype(element);
    Rows<const T> in = rows<const T>(x_rows);
    Rows<T> out = rows<T>(y);
    auto* kernel = MINIFT_KERNEL(dropout<T>);
    parallel_rows(in.count, in.width, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        kernel(in[row], row * in.width, static_cast<uint64_t>(seed), static_cast<uint32_t>(num_dropped), out[row],
               in.width);
      }
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, CPU, m) {
  m.impl("dropout", TORCH_BOX(&dropout));
}

}  // namespace minift
