// Products of small matrices by a warp, as CUDA's <mma.h>, for cuda_runtime.h beside this.
//
// How a fragment is spread over lanes is nobody's business; here every lane holds all of it and computes all of it, but
// uses its share of memory only, for races.h. All lanes must take part, and alignment is checked as CUDA documents it:
// 32 bytes, and rows a multiple of 16 bytes apart.

#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K>
struct Shape;
template <int M, int N, int K>
struct Shape<matrix_a, M, N, K> { static constexpr int ROWS = M, COLUMNS = K; };
template <int M, int N, int K>
struct Shape<matrix_b, M, N, K> { static constexpr int ROWS = K, COLUMNS = N; };
template <int M, int N, int K>
struct Shape<accumulator, M, N, K> { static constexpr int ROWS = M, COLUMNS = N; };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment : Shape<Use, M, N, K> {
  static_assert(M == 16 && N == 16 && K == 16, "not here: other shapes");
  using Shape<Use, M, N, K>::ROWS;
  using Shape<Use, M, N, K>::COLUMNS;
  float at[ROWS][COLUMNS];
};

inline float widened(float value) { return value; }
inline float widened(__nv_bfloat16 value) { return __bfloat162float(value); }
inline float widened(__half value) { return __half2float(value); }

template <class T>
void check_access(const T* memory, unsigned stride) {
  __syncwarp();
  if (reinterpret_cast<uintptr_t>(memory) % 32 != 0) cuda_on_cpu::fail("a matrix of a warp must be 32-byte aligned");
  if (stride * sizeof(T) % 16 != 0) cuda_on_cpu::fail("rows of a warp's matrix must be multiples of 16 bytes apart");
}

// Which of a tile's elements a lane loads or stores: visit(i, j).
template <int ROWS, int COLUMNS, class Visit>
MINIFT_UNWATCHED void for_each_of_lane(const Visit& visit) {
  int lane = cuda_on_cpu::lane(), j = lane % COLUMNS;
  for (int i = lane / COLUMNS; i < ROWS; i += cuda_on_cpu::WARP / COLUMNS) visit(i, j);
}

template <class F>
MINIFT_UNWATCHED void fill_fragment(F& fragment, float value) {
  for (auto& row : fragment.at) {
    for (float& element : row) element = value;
  }
}

template <class Use, int M, int N, int K, class T, class Layout>
MINIFT_UNWATCHED void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& to, const T* from, unsigned stride) {
  check_access(from, stride);
  constexpr bool BY_ROWS = std::is_same_v<Layout, row_major>;
  static_assert(BY_ROWS || std::is_same_v<Layout, col_major>);
  for (int i = 0; i < to.ROWS; ++i) {
    for (int j = 0; j < to.COLUMNS; ++j) to.at[i][j] = widened(BY_ROWS ? from[i * stride + j] : from[j * stride + i]);
  }
  for_each_of_lane<16, 16>([&](int i, int j) { cuda_on_cpu::use(from + i * stride + j, sizeof(T), false); });
  __syncwarp();
}

template <int M, int N, int K>
void store_matrix_sync(float* to, const fragment<accumulator, M, N, K, float>& from, unsigned stride, layout_t layout) {
  check_access(to, stride);
  for_each_of_lane<M, N>([&](int i, int j) {
    (layout == mem_row_major ? to[i * stride + j] : to[j * stride + i]) = from.at[i][j];
  });
  __syncwarp();
}

template <int M, int N, int K, class A, class B, class LayoutA, class LayoutB>
MINIFT_UNWATCHED void mma_sync(fragment<accumulator, M, N, K, float>& sum,
                               const fragment<matrix_a, M, N, K, A, LayoutA>& a,
                               const fragment<matrix_b, M, N, K, B, LayoutB>& b,
                               const fragment<accumulator, M, N, K, float>& add) {
  __syncwarp();
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) {
      float total = add.at[i][j];
      for (int k = 0; k < K; ++k) total += a.at[i][k] * b.at[k][j];
      sum.at[i][j] = total;
    }
  }
}

}  // namespace nvcuda::wmma
