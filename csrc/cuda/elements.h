// Elements on the GPU: arithmetic is fp32, memory fp32, bf16 or fp16, rounded to nearest even. A thread moves packs of
// PACK elements: one 16-byte access in 16-bit types, two in fp32, where addresses allow it, else one element at a time.
// Kernels whose memory is mostly fp32 move packs of QUAD, one access of 16 bytes: a store then fills whole sectors.

#pragma once

#include "../rows.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace minift::cuda {

constexpr int PACK = 8, QUAD = 4;

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

template <int SIZE>
struct Floats {
  float at[SIZE];
};
using Pack = Floats<PACK>;
using Quad = Floats<QUAD>;

// Of bits, the lowest; and back.
template <class T>
__device__ inline T from_bits(uint32_t bits) { return {static_cast<uint16_t>(bits)}; }
template <>
__device__ inline float from_bits<float>(uint32_t bits) { return __uint_as_float(bits); }
template <>
__device__ inline uint16_t from_bits<uint16_t>(uint32_t bits) { return static_cast<uint16_t>(bits); }
template <>
__device__ inline uint8_t from_bits<uint8_t>(uint32_t bits) { return static_cast<uint8_t>(bits); }

template <class T>
__device__ inline uint32_t to_bits(T value) { return value.bits; }
__device__ inline uint32_t to_bits(float value) { return __float_as_uint(value); }
__device__ inline uint32_t to_bits(uint16_t value) { return value; }
__device__ inline uint32_t to_bits(uint8_t value) { return value; }

// As in memory, and in as many registers: elements of 2 bytes would get a register each.
template <class T, int SIZE = PACK>
struct alignas(SIZE * sizeof(T) < 16 ? SIZE * sizeof(T) : 16) PackOf {
  static constexpr int PER_WORD = 4 / sizeof(T), WORDS = SIZE / PER_WORD;
  uint32_t words[WORDS];

  __device__ T at(int i) const { return from_bits<T>(words[i / PER_WORD] >> shift(i)); }
  __device__ void set(int i, T value) { words[i / PER_WORD] |= to_bits(value) << shift(i); }  // once, where zeros were

  // What is computed of it from here on is computed again: the fp32 of before need not wait in twice the registers.
  __device__ void forget_floats() {
#if defined(__CUDA_ARCH__)
#pragma unroll
    for (int i = 0; i < WORDS; ++i) asm("" : "+r"(words[i]));
#endif
  }

 private:
  __device__ static int shift(int i) { return i % PER_WORD * (32 / PER_WORD); }
};

// Whether packs may start at every multiple of SIZE elements from `data`.
template <int SIZE = PACK, class T>
__host__ inline bool aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(PackOf<T, SIZE>) == 0;
}

// Whether this is so in every row, and rows are whole packs.
template <class T>
__host__ inline bool aligned(const Rows<T>& rows) {
  bool strides = rows.outer_stride % PACK == 0 && rows.inner_stride % PACK == 0;
  return aligned(rows.data) && strides && rows.width % PACK == 0;
}

// The first `count` elements, and zeros, as they are in memory. A kernel first loads everything that it can: loads that
// nothing waits for are in flight together. VECTOR: `from` is aligned.
template <bool VECTOR, int SIZE = PACK, class T>
__device__ inline PackOf<T, SIZE> load_elements(const T* from, int64_t count) {
  if (VECTOR && count >= SIZE) return *reinterpret_cast<const PackOf<T, SIZE>*>(from);
  PackOf<T, SIZE> elements{};
#pragma unroll
  for (int i = 0; i < SIZE; ++i) elements.set(i, i < count ? from[i] : T{});
  return elements;
}

template <class T, int SIZE>
__device__ inline Floats<SIZE> to_floats(const PackOf<T, SIZE>& elements) {
  Floats<SIZE> pack;
#pragma unroll
  for (int i = 0; i < SIZE; ++i) pack.at[i] = to_float(elements.at(i));
  return pack;
}

template <class T, int SIZE>
__device__ inline PackOf<T, SIZE> from_floats(const Floats<SIZE>& pack) {
  PackOf<T, SIZE> elements{};
#pragma unroll
  for (int i = 0; i < SIZE; ++i) elements.set(i, from_float<T>(pack.at[i]));
  return elements;
}

// A whole pack to global memory, where `to` is aligned. Of an assignment the compiler makes stores of two bytes in some
// kernels, for reasons of its own, and those take four times as long.
template <class T, int SIZE>
__device__ inline void store_elements(T* to, const PackOf<T, SIZE>& elements) {
#if defined(__CUDA_ARCH__)
  constexpr int WORDS = PackOf<T, SIZE>::WORDS;
  static_assert(WORDS == 1 || WORDS == 2 || WORDS % 4 == 0);
  const uint32_t* words = elements.words;
  size_t address = __cvta_generic_to_global(to);
  if constexpr (WORDS == 1) {
    asm("st.global.u32 [%0], %1;" ::"l"(address), "r"(words[0]) : "memory");
  } else if constexpr (WORDS == 2) {
    asm("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1]) : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
      asm("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address + 4 * i), "r"(words[i]), "r"(words[i + 1]),
          "r"(words[i + 2]), "r"(words[i + 3])
          : "memory");
    }
  }
#else
  *reinterpret_cast<PackOf<T, SIZE>*>(to) = elements;
#endif
}

// To shared memory, where an assignment does it.
template <class T, int SIZE>
__device__ inline void store_shared(T* to, const PackOf<T, SIZE>& elements) {
  *reinterpret_cast<PackOf<T, SIZE>*>(to) = elements;
}

// The first `count` elements to global memory. VECTOR: `to` is aligned.
template <bool VECTOR, class T, int SIZE>
__device__ inline void store_elements(T* to, const PackOf<T, SIZE>& elements, int64_t count) {
  if (VECTOR && count >= SIZE) return store_elements(to, elements);
#pragma unroll
  for (int i = 0; i < SIZE; ++i) {
    if (i < count) to[i] = elements.at(i);
  }
}

template <bool VECTOR, class T, int SIZE>
__device__ inline void store_pack(T* to, const Floats<SIZE>& pack, int64_t count) {
  store_elements<VECTOR>(to, from_floats<T>(pack), count);
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
