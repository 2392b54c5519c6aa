// Elements on the GPU: arithmetic is fp32, memory fp32, bf16 or fp16, rounded to nearest even. A thread moves packs of
// PACK elements: one 16-byte access in 16-bit types, two in fp32, where addresses allow it, else one element at a time.

#pragma once

#include "../rows.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace minift::cuda {

constexpr int PACK = 8;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(Bf16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }
__device__ inline float to_float(Fp16 value) { return __half2float(__ushort_as_half(value.bits)); }

template <class T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) { return value; }
template <>
__device__ inline Bf16 from_float<Bf16>(float value) { return {__bfloat16_as_ushort(__float2bfloat16_rn(value))}; }
template <>
__device__ inline Fp16 from_float<Fp16>(float value) { return {__half_as_ushort(__float2half_rn(value))}; }

template <class T>
__device__ float round_to(float value) { return to_float(from_float<T>(value)); }

struct Pack {
  float at[PACK];
};

template <class T>
struct alignas(16) PackOf {
  T at[PACK];
};

// Whether packs may start at every multiple of PACK elements from `data`.
template <class T>
__host__ inline bool aligned(const T* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Whether this is so in every row, and rows are whole packs.
template <class T>
__host__ inline bool aligned(const Rows<T>& rows) {
  bool strides = rows.outer_stride % PACK == 0 && rows.inner_stride % PACK == 0;
  return aligned(rows.data) && strides && rows.width % PACK == 0;
}

// The first `count` elements, and zeros, as they are in memory. A kernel first loads everything that it can: loads that
// nothing waits for are in flight together. VECTOR: `from` is aligned.
template <bool VECTOR, class T>
__device__ inline PackOf<T> load_elements(const T* from, int64_t count) {
  if (VECTOR && count >= PACK) return *reinterpret_cast<const PackOf<T>*>(from);
  PackOf<T> elements;
#pragma unroll
  for (int i = 0; i < PACK; ++i) elements.at[i] = i < count ? from[i] : T{};
  return elements;
}

template <class T>
__device__ inline Pack to_floats(const PackOf<T>& elements) {
  Pack pack;
#pragma unroll
  for (int i = 0; i < PACK; ++i) pack.at[i] = to_float(elements.at[i]);
  return pack;
}

template <bool VECTOR, class T>
__device__ inline void store_pack(T* to, const Pack& pack, int64_t count) {
  if (VECTOR && count >= PACK) {
    PackOf<T> elements;
#pragma unroll
    for (int i = 0; i < PACK; ++i) elements.at[i] = from_float<T>(pack.at[i]);
    *reinterpret_cast<PackOf<T>*>(to) = elements;
  } else {
#pragma unroll
    for (int i = 0; i < PACK; ++i) {
      if (i < count) to[i] = from_float<T>(pack.at[i]);
    }
  }
}

// As above, where being aligned is no constant of the kernel; it is the same for all of its threads.
template <class T>
__device__ inline Pack load_pack(const T* from, int64_t count, bool vector) {
  return to_floats(vector ? load_elements<true>(from, count) : load_elements<false>(from, count));
}

template <class T>
__device__ inline void store_pack(T* to, const Pack& pack, int64_t count, bool vector) {
  vector ? store_pack<true>(to, pack, count) : store_pack<false>(to, pack, count);
}

}  // namespace minift::cuda
