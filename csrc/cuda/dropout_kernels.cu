// Dropout on the GPU: the mask is made again from seed and element index wherever it is needed.

#include "dropout_kernels.h"

#include "../random_bits.h"
#include "elementwise.h"

namespace minift::cuda {
namespace {

struct Drop {
  uint64_t seed;
  uint32_t num_dropped;

  __device__ void operator()(int64_t element, const Pack (&inputs)[1], Pack (&outputs)[1]) const {
#pragma unroll
    for (int first = 0; first < PACK; first += 4) {
      uint64_t bits = random_bits_of_four(seed, element + first);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        bool keep = (bits >> (16 * i) & 0xffff) >= num_dropped;
        outputs[0].at[first + i] = keep ? inputs[0].at[first + i] : 0.0f;
      }
    }
  }
};

}  // namespace

template <class T>
void dropout(Rows<const T> x, uint64_t seed, uint32_t num_dropped, Rows<T> y, cudaStream_t stream) {
  launch_elementwise("dropout", Elementwise<T, 1, 1>{{x}, {y}}, Drop{seed, num_dropped}, stream);
}

template void dropout(Rows<const float>, uint64_t, uint32_t, Rows<float>, cudaStream_t);
template void dropout(Rows<const Bf16>, uint64_t, uint32_t, Rows<Bf16>, cudaStream_t);
template void dropout(Rows<const Fp16>, uint64_t, uint32_t, Rows<Fp16>, cudaStream_t);

}  // namespace minift::cuda
