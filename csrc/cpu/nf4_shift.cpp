// ICQ's search on the CPU: the shift of each block of weights after which its NF4 codes have the largest entropy.

#include "../nf4.h"
#include "instruction_set.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>

#define MINIFT_KERNELS "nf4_shift_kernels.h"
#include "for_each_instruction_set.h"

namespace minift {
namespace {

Tensor nf4_shifts(const Tensor& columns, const Tensor& candidates, const Tensor& lacks) {
  STD_TORCH_CHECK(columns.dim() == 2 && columns.size(0) > 0 && columns.scalar_type() == ScalarType::Float,
                  "nf4_shifts: columns must be float32 (size, blocks)");
  int64_t size = columns.size(0), blocks = columns.size(1);
  STD_TORCH_CHECK(candidates.dim() == 2 && candidates.size(0) > 0 && candidates.size(1) == blocks &&
                      candidates.scalar_type() == ScalarType::BFloat16,
                  "nf4_shifts: candidates must be bfloat16 (candidates, blocks)");
  STD_TORCH_CHECK(lacks.dim() == 1 && lacks.size(0) == size + 1 && lacks.scalar_type() == ScalarType::Long,
                  "nf4_shifts: lacks must be int64 (size + 1,)");
  Tensor in = torch::stable::contiguous(columns), tried = torch::stable::contiguous(candidates);
  Tensor table = torch::stable::contiguous(lacks), best = torch::stable::new_empty(tried, {blocks});
  auto* kernel = MINIFT_KERNEL(nf4_shifts);
  parallel_rows(blocks, size * tried.size(0), [&](int64_t begin, int64_t end) {
    kernel(static_cast<const float*>(in.data_ptr()), static_cast<const Bf16*>(tried.data_ptr()),
           static_cast<const int64_t*>(table.data_ptr()), size, tried.size(0), blocks, begin, end,
           static_cast<Bf16*>(best.data_ptr()));
  });
  return best;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, CPU, m) { m.impl("nf4_shifts", TORCH_BOX(&nf4_shifts)); }

}  // namespace minift
