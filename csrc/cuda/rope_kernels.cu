// Rotary position embedding on the GPU. Neighbouring threads have neighbouring packs of pairs, and each of them up to
// HEADS heads of a token, for which it reads cosine and sine once and whose loads are in flight together.

#include "rope_kernels.h"

#include "elements.h"
#include "launch.h"

namespace minift::cuda {
namespace {

constexpr int THREADS = 256, HEADS = 2;

// VECTOR: the halves of every head are aligned and made of whole packs.
template <class T, bool VECTOR>
__global__ void __launch_bounds__(THREADS)
    rotate(Rows<const T> x, const float* cos, const float* sin, float sign, int64_t num_heads, int64_t num_items,
           T* y) {
  int64_t half = x.width / 2, packs = (half + PACK - 1) / PACK, groups = (num_heads + HEADS - 1) / HEADS;
  for (int64_t item = int64_t{blockIdx.x} * THREADS + threadIdx.x; item < num_items;
       item += int64_t{gridDim.x} * THREADS) {
    int64_t group = item / packs, token = group / groups;
    int64_t i = (item - group * packs) * PACK, count = VECTOR ? PACK : half - i;
    int64_t head = (group - token * groups) * HEADS, row = token * num_heads + head;
    PackOf<T> first[HEADS], second[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      // What would be beyond the last head is that head once more: no branch stands between the loads.
      const T* from = x[row + min(int64_t{h}, num_heads - 1 - head)] + i;
      first[h] = load_elements<VECTOR>(from, count);
      second[h] = load_elements<VECTOR>(from + half, count);
    }
    Pack c = to_floats(load_elements<VECTOR>(cos + token * half + i, count));
    Pack s = to_floats(load_elements<VECTOR>(sin + token * half + i, count));
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      if (head + h >= num_heads) break;
      Pack a = to_floats(first[h]), b = to_floats(second[h]), turned_a, turned_b;
#pragma unroll
      for (int k = 0; k < PACK; ++k) {
        float signed_sin = s.at[k] * sign;
        turned_a.at[k] = a.at[k] * c.at[k] - b.at[k] * signed_sin;
        turned_b.at[k] = b.at[k] * c.at[k] + a.at[k] * signed_sin;
      }
      T* to = y + (row + h) * x.width + i;
      store_pack<VECTOR>(to, turned_a, count);
      store_pack<VECTOR>(to + half, turned_b, count);
    }
  }
}

}  // namespace

template <class T>
void rope(Rows<const T> x, const float* cos, const float* sin, bool inverse, int64_t num_heads, T* y,
          cudaStream_t stream) {
  if (x.count == 0) return;
  int64_t half = x.width / 2;
  int64_t num_items = x.count / num_heads * ((num_heads + HEADS - 1) / HEADS) * ((half + PACK - 1) / PACK);
  bool vector = aligned(x) && half % PACK == 0 && aligned(cos) && aligned(sin) && aligned(y);
  launch("rope", vector ? &rotate<T, true> : &rotate<T, false>, blocks_for(num_items, THREADS), THREADS, stream, x, cos,
         sin, inverse ? -1.0f : 1.0f, num_heads, num_items, y);
}

#define INSTANTIATE(T) \
  template void rope(Rows<const T>, const float*, const float*, bool, int64_t, T*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(Bf16)
INSTANTIATE(Fp16)

}  // namespace minift::cuda
