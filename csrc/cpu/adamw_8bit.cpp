// AdamW with 8-bit moments on the CPU: all tensors 1-D and contiguous, master fp32 or bf16.

#include "adamw.h"
#include "blockwise.h"
#include "instruction_set.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>

#define MINIFT_KERNELS "adamw_8bit_kernels.h"
#include "for_each_instruction_set.h"

namespace minift {
namespace {

constexpr int64_t SIGNED_BUCKETS = 2 * 1473, UNSIGNED_BUCKETS = 2945;

template <class T>
T* pointer(const Tensor& tensor, ScalarType dtype, int64_t size, const char* message) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.is_contiguous() && tensor.scalar_type() == dtype &&
                      tensor.size(0) == size,
                  message);
  return static_cast<T*>(tensor.data_ptr());
}

DynamicMap dynamic_map(const Tensor& values, const Tensor& buckets, int64_t num_buckets) {
  constexpr const char* MESSAGE = "adamw_8bit: not the tables of a dynamic map";
  return {pointer<const uint32_t>(values, ScalarType::Float, 256, MESSAGE),
          pointer<const uint32_t>(buckets, ScalarType::Int, num_buckets, MESSAGE)};
}

void adamw_8bit(const Tensor& master, const Tensor& grad, const Tensor& exp_avg_codes, const Tensor& exp_avg_absmax,
                const Tensor& exp_avg_sq_codes, const Tensor& exp_avg_sq_absmax, const Tensor& signed_values,
                const Tensor& signed_buckets, const Tensor& unsigned_values, const Tensor& unsigned_buckets,
                const std::optional<Tensor>& wire, const std::optional<Tensor>& grad_factor, double beta1,
                double beta2, double eps, double step_size, double keep, int64_t key, int64_t first) {
  check_weights(master, grad, wire);
  int64_t numel = master.size(0), num_blocks = (numel + BLOCK - 1) / BLOCK;
  constexpr const char* CODES = "adamw_8bit: codes must be contiguous uint8 of the shape of master";
  constexpr const char* ABSMAX = "adamw_8bit: absmax must be contiguous float32, one for every 256 elements";
  QuantizedMoments moments{
      pointer<uint8_t>(exp_avg_codes, ScalarType::Byte, numel, CODES),
      pointer<uint8_t>(exp_avg_sq_codes, ScalarType::Byte, numel, CODES),
      pointer<float>(exp_avg_absmax, ScalarType::Float, num_blocks, ABSMAX),
      pointer<float>(exp_avg_sq_absmax, ScalarType::Float, num_blocks, ABSMAX),
      dynamic_map(signed_values, signed_buckets, SIGNED_BUCKETS),
      dynamic_map(unsigned_values, unsigned_buckets, UNSIGNED_BUCKETS),
  };
  AdamwStep step(grad_factor, beta1, beta2, eps, step_size, keep, key, first);
  dispatch_weights(master, grad, wire, [&](auto weights) {
    auto* kernel = MINIFT_KERNEL(adamw_8bit<decltype(weights)>);
    parallel_rows(num_blocks, BLOCK, [&](int64_t begin, int64_t end) {
      kernel(step, moments, weights, numel, begin, end);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, CPU, m) {
  m.impl("adamw_8bit", TORCH_BOX(&adamw_8bit));
}

}  // namespace minift
