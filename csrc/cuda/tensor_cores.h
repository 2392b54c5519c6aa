// The tensor cores' product of a warp, (16 x 16) (16 x 8) in bf16, with operands in registers.
//
// What a lane holds is documented (PTX ISA, mma.m16n8k16), so a fragment is loaded from memory directly, and a sum is
// stored from where it is: wmma's fragments go through shared memory on both ways. The instruction sums over k in any
// order; here lane 4 g + q holds the four neighbours k = 4 q .. 4 q + 3 of rows g and g + 8 of A and of column g of B,
// and has the sums of rows g and g + 8, columns 2 q and 2 q + 1. Who multiplies a matrix from both sides loads it once:
// the tensor cores' layout of its transpose is a matter of the registers of a warp, too (`transposed`).

#pragma once

#include "elements.h"

#if !defined(__CUDACC__)
#include <mma_m16n8k16.h>  // tests/cuda_on_cpu
#endif

namespace minift::cuda {

// Neighbours in memory, two in a register.
using Four = PackOf<Bf16, QUAD>;
using Eight = PackOf<Bf16>;

__device__ __forceinline__ Four half_of(const Eight& eight, int half) {
  return {eight.words[2 * half], eight.words[2 * half + 1]};
}

#if defined(__CUDACC__)
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  // Volatile: it must not move to where only some lanes need a sum.
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Of an 8 x 8 matrix lane 4 g + q has row g, columns 2 q and 2 q + 1, and gets column g, rows 2 q and 2 q + 1.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t row) {
  uint32_t column;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(row));
  return column;
}
#endif

// sums[0], [1]: of row g; sums[2], [3]: of row g + 8.
__device__ __forceinline__ void multiply(float (&sums)[4], const Four& row, const Four& row_8, const Four& column) {
  mma_m16n8k16(sums, {row.words[0], row_8.words[0], row.words[1], row_8.words[1]}, column.words);
}

// Column g of two such matrices, one below the other, of which this lane has a word of rows g and g + 8 each: elements
// 2 q and 2 q + 1 of the upper one, then of the lower one, as `multiply` takes them on both sides.
__device__ __forceinline__ Four transposed(uint32_t upper, uint32_t lower) {
  return {movmatrix_trans(upper), movmatrix_trans(lower)};
}

// The first `count` elements, and zeros. VECTOR: `from` is aligned, and there are all of them, or none.
template <bool VECTOR, int SIZE>
__device__ __forceinline__ PackOf<Bf16, SIZE> load_up_to(const Bf16* from, int count) {
  if (VECTOR && count <= 0) return PackOf<Bf16, SIZE>{};
  return load_elements<VECTOR, SIZE>(from, VECTOR ? SIZE : count);
}

// Four lines, zeros beyond the first `lines` and their first `length` elements.
template <bool VECTOR, int SIZE>
__device__ __forceinline__ void load_lines(PackOf<Bf16, SIZE> (&to)[4], const Bf16* from, int64_t stride, int lines,
                                           int length) {
#pragma unroll
  for (int i = 0; i < 4; ++i, from += stride) to[i] = load_up_to<VECTOR, SIZE>(from, i < lines ? length : 0);
}

// Element i of each of them.
template <int SIZE>
__device__ __forceinline__ Four across(const PackOf<Bf16, SIZE> (&lines)[4], int i) {
  uint32_t a = lines[0].words[i / 2], b = lines[1].words[i / 2], c = lines[2].words[i / 2], d = lines[3].words[i / 2];
  if (i % 2 == 0) return {(a & 0xffff) | b << 16, (c & 0xffff) | d << 16};
  return {a >> 16 | (b & 0xffff0000), c >> 16 | (d & 0xffff0000)};
}

}  // namespace minift::cuda
