// AdamW with fp32 moments on the GPU, bound by memory: 28 bytes of an element (24 with a bf16 master), each of them
// once. In plain PyTorch they are 80, in eight launches.
//
// A thread has four weights at a time: its four loads of 16 bytes do not wait for each other, and with every
// multiprocessor full of threads a hundred KB are in flight, several times what memory needs to be busy.

#include "adamw_kernels.h"

#include "adamw_update.h"
#include "launch.h"

namespace minift::cuda {
namespace {

constexpr int THREADS = 256;

template <bool VECTOR, class T, bool IN_HALVES>
__device__ __forceinline__ void step_quad(const AdamwStep& step, float factor, const Weights<T, IN_HALVES>& weights,
                                          float* exp_avg, float* exp_avg_sq, int64_t i, int64_t count) {
  if (VECTOR) count = QUAD;
  Quad m = to_floats(load_elements<VECTOR, QUAD>(exp_avg + i, count));
  Quad v = to_floats(load_elements<VECTOR, QUAD>(exp_avg_sq + i, count));
  update_quad<VECTOR>(step, factor, weights, i, count, m, v);
  store_pack<VECTOR>(exp_avg + i, m, count);
  store_pack<VECTOR>(exp_avg_sq + i, v, count);
}

template <class T, bool IN_HALVES>
__global__ void __launch_bounds__(THREADS)
    adamw_kernel(const __grid_constant__ AdamwStep step, Weights<T, IN_HALVES> weights, float* exp_avg,
                 float* exp_avg_sq, int64_t n, bool vector) {
  float factor = step.factor();
  if (!is_finite(factor)) return;
  int64_t stride = int64_t{gridDim.x} * THREADS * QUAD;
  for (int64_t i = (int64_t{blockIdx.x} * THREADS + threadIdx.x) * QUAD; i < n; i += stride) {
    if (vector && n - i >= QUAD) {
      step_quad<true>(step, factor, weights, exp_avg, exp_avg_sq, i, QUAD);
    } else {
      step_quad<false>(step, factor, weights, exp_avg, exp_avg_sq, i, n - i);
    }
  }
}

}  // namespace

template <class T, bool IN_HALVES>
void adamw(const AdamwStep& step, Weights<T, IN_HALVES> weights, float* exp_avg, float* exp_avg_sq, int64_t n,
           cudaStream_t stream) {
  bool vector = aligned(weights) && aligned<QUAD>(exp_avg) && aligned<QUAD>(exp_avg_sq);
  launch("adamw", adamw_kernel<T, IN_HALVES>, blocks_for(n, THREADS * QUAD), THREADS, stream, step, weights, exp_avg,
         exp_avg_sq, n, vector);
}

#define INSTANTIATE(T, IN_HALVES) \
  template void adamw(const AdamwStep&, Weights<T, IN_HALVES>, float*, float*, int64_t, cudaStream_t);
MINIFT_FOR_ALL_WEIGHTS(INSTANTIATE)

}  // namespace minift::cuda
