// The instructions mma.m16n8k16 in bf16 and movmatrix.trans (csrc/cuda/tensor_cores.h), for cuda_runtime.h beside this.
//
// Lanes show each other their registers, and each computes its own sums, by the layouts of the PTX ISA: lane 4 g + q
// has in a[i] row g + 8 (i % 2) of A, columns 2 q + 8 (i / 2) and the next; in b[i] column g of B, rows 2 q + 8 i and
// the next; in d[i] row g + 8 (i / 2), column 2 q + i % 2.

#pragma once

#include "cuda_bf16.h"

namespace cuda_on_cpu {

// Two registers of every lane.
struct Shown {
  uint64_t of[WARP];

  MINIFT_UNWATCHED float bf16(int lane, int index) const {
    return __bfloat162float({static_cast<uint16_t>(of[lane] >> 16 * index)});
  }
};

MINIFT_UNWATCHED inline Shown show_all(uint32_t low, uint32_t high) {
  Shown all;
  std::memcpy(all.of, shown_by_all(low | uint64_t{high} << 32), sizeof all.of);
  return all;
}

}  // namespace cuda_on_cpu

MINIFT_UNWATCHED inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using namespace cuda_on_cpu;
  Shown of_a[2] = {show_all(a[0], a[1]), show_all(a[2], a[3])}, of_b = show_all(b[0], b[1]);
  int g = lane() / 4, q = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    int column = 2 * q + i % 2;
    for (int k = 0; k < 16; ++k) {
      int holder = k % 8 / 2;  // of this k, among the four lanes of a row
      float of_row = of_a[k / 8].bf16(4 * g + holder, i / 2 * 2 + k % 2);
      d[i] += of_row * of_b.bf16(4 * column + holder, k / 8 * 2 + k % 2);
    }
  }
}

// Lane 4 g + q has row g of an 8 x 8 matrix, columns 2 q and the next, and gets column g, rows 2 q and the next.
MINIFT_UNWATCHED inline uint32_t movmatrix_trans(uint32_t row) {
  using namespace cuda_on_cpu;
  const uint64_t* rows = shown_by_all(row);
  int g = lane() / 4, q = lane() % 4;
  uint32_t column = 0;
  for (int i = 0; i < 2; ++i) column |= (rows[4 * (2 * q + i) + g / 2] >> 16 * (g % 2) & 0xffff) << 16 * i;
  return column;
}
