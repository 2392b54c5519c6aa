// Quantising to NF4 and back on the CPU; flat contiguous tensors. The format: nf4.h.

#include "../nf4_tensors.h"

#include "instruction_set.h"
#include "parallel.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#define MINIFT_KERNELS "nf4_kernels.h"
#include "for_each_instruction_set.h"

namespace minift {
namespace {

float to_float(float value) { return value; }
float to_float(Bf16 value) { return __builtin_bit_cast(float, uint32_t{value.bits} << 16); }
float to_float(Fp16 value) { return portable::load(&value, 1)[0]; }

// The last block, if it is incomplete. Unlike complete ones bitsandbytes divides it (instead of multiplying by the
// reciprocal) and stores what it divided by.
template <class T>
float incomplete_absmax(const T* elements, int64_t count) {
  float absmax = 0;
  for (int64_t i = 0; i < count; ++i) {
    float magnitude = __builtin_fabsf(to_float(elements[i]));
    if (!(magnitude <= absmax)) absmax = magnitude;  // a NaN comes through
    if (absmax != absmax) return absmax;
  }
  return absmax > nf4::SMALLEST_DIVISOR ? absmax : nf4::SMALLEST_DIVISOR;
}

template <class T>
float quantize_incomplete(const T* elements, int64_t count, uint8_t* codes) {
  float absmax = incomplete_absmax(elements, count);
  for (int64_t i = 0; i < count; i += 2) {
    float odd = i + 1 < count ? to_float(elements[i + 1]) : 0.0f;
    codes[i / 2] = nf4::pack(nf4::code_of(to_float(elements[i]) / absmax, nf4::THRESHOLDS),
                             nf4::code_of(odd / absmax, nf4::THRESHOLDS));
  }
  return absmax;
}

template <class T>
void dequantize_incomplete(const uint8_t* codes, float scale, T* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint8_t byte = codes[i / 2];
    float value = nf4::CODEBOOK[i % 2 == 0 ? nf4::even_code(byte) : nf4::odd_code(byte)] * scale;
    portable::store(out + i, portable::splat(value), 1);
  }
}

Tensor nf4_absmax(const Tensor& weight, int64_t block_size) {
  check_nf4_block_size("nf4_absmax", block_size);
  Tensor flat = torch::stable::contiguous(weight);
  int64_t n = weight.numel(), complete = n / block_size, num_blocks = (n + block_size - 1) / block_size;
  Tensor absmax = torch::stable::new_empty(weight, {num_blocks}, ScalarType::Float);
  float* scales = static_cast<float*>(absmax.data_ptr());
  dispatch_dtype(weight, "nf4_absmax", [&](auto element) {
    using T = decltype(element);
    const T* elements = static_cast<const T*>(flat.data_ptr());
    auto* kernel = MINIFT_KERNEL(nf4_absmax<T>);
    parallel_rows(complete, block_size, [&](int64_t begin, int64_t end) {
      kernel(elements, block_size, scales, begin, end);
    });
    int64_t done = complete * block_size;
    if (done < n) scales[complete] = incomplete_absmax(elements + done, n - done);
  });
  return absmax;
}

std::tuple<Tensor, Tensor> nf4_quantize(const Tensor& weight, int64_t block_size) {
  check_nf4_block_size("nf4_quantize", block_size);
  Tensor flat = torch::stable::contiguous(weight);
  int64_t n = weight.numel(), complete = n / block_size, num_blocks = (n + block_size - 1) / block_size;
  Tensor absmax = torch::stable::new_empty(weight, {num_blocks}, ScalarType::Float);
  Tensor codes = torch::stable::new_empty(weight, {(n + 1) / 2}, ScalarType::Byte);
  float* scales = static_cast<float*>(absmax.data_ptr());
  uint8_t* bytes = static_cast<uint8_t*>(codes.data_ptr());
  dispatch_dtype(weight, "nf4_quantize", [&](auto element) {
    using T = decltype(element);
    const T* elements = static_cast<const T*>(flat.data_ptr());
    auto* kernel = MINIFT_KERNEL(nf4_quantize<T>);
    parallel_rows(complete, block_size, [&](int64_t begin, int64_t end) {
      kernel(elements, block_size, bytes, scales, begin, end);
    });
    int64_t done = complete * block_size;
    if (done < n) scales[complete] = quantize_incomplete(elements + done, n - done, bytes + done / 2);
  });
  return {codes, absmax};
}

void nf4_dequantize(const Tensor& out, const Tensor& codes, const Tensor& scales,
                    const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& offset,
                    const std::optional<Tensor>& nested_map, int64_t block_size, int64_t start, int64_t stride) {
  nf4::Scales block_scales = nf4_scales(scales, nested_absmax, offset, nested_map);
  const uint8_t* bytes = nf4_codes(codes);
  check_nf4_rows(out, codes, scales, block_size, start, stride);
  int64_t rows = out.size(0), width = out.size(1), blocks_per_row = width / block_size;
  if (rows == 0 || width == 0) return;
  dispatch_dtype(out, "nf4_dequantize", [&](auto element) {
    using T = decltype(element);
    T* to = static_cast<T*>(out.data_ptr());
    auto* kernel = MINIFT_KERNEL(nf4_dequantize<T>);
    parallel_rows(rows * blocks_per_row, block_size, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        int64_t row = begin / blocks_per_row, first = (start + row * stride) / block_size - row * blocks_per_row;
        int64_t row_end = std::min(end, (row + 1) * blocks_per_row);
        kernel(bytes, block_scales, block_size, to + begin * block_size, first + begin, first + row_end);
        begin = row_end;
      }
    });
    if (int64_t done = blocks_per_row * block_size; done < width) {
      dequantize_incomplete(bytes + (start + done) / 2, block_scales[(start + done) / block_size], to + done,
                            width - done);
    }
  });
}

// nf4.h for Python.
std::tuple<Tensor, Tensor> nf4_tables() {
  Tensor codebook = torch::stable::empty({16}, ScalarType::Float);
  Tensor thresholds = torch::stable::empty({15}, ScalarType::Float);
  __builtin_memcpy(codebook.data_ptr(), nf4::CODEBOOK, sizeof nf4::CODEBOOK);
  __builtin_memcpy(thresholds.data_ptr(), nf4::THRESHOLDS, sizeof nf4::THRESHOLDS);
  return {codebook, thresholds};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, CPU, m) {
  m.impl("nf4_absmax", TORCH_BOX(&nf4_absmax));
  m.impl("nf4_quantize", TORCH_BOX(&nf4_quantize));
  m.impl("nf4_dequantize", TORCH_BOX(&nf4_dequantize));
}

STABLE_TORCH_LIBRARY_IMPL(minift, CompositeExplicitAutograd, m) {
  m.impl("nf4_tables", TORCH_BOX(&nf4_tables));
}

}  // namespace minift
