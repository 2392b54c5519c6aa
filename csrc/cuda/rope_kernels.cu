// Rotary position embedding on the GPU. Neighbouring threads have neighbouring packs of pairs, and each of them up to
// HEADS heads of a token, for which it reads cosine and sine once and whose loads are in flight together.

#include "rope_kernels.h"

#include "elements.h"
#include "launch.h"

namespace minift::cuda {
namespace {

constexpr int THREADS = 256, HEADS = 2;

// VECTOR: the halves of every head are aligned and made of whole packs. Items are counted in 32 bits, where a division
// takes a third of the instructions.
template <class T, bool VECTOR>
__global__ void __launch_bounds__(THREADS)
    rotate(const T* x, int64_t token_stride, int64_t head_stride, const float* cos, const float* sin, float sign,
           int half, int num_heads, int num_items, T* y) {
  int packs = (half + PACK - 1) / PACK, groups = (num_heads + HEADS - 1) / HEADS;
  for (int64_t item = int64_t{blockIdx.x} * THREADS + threadIdx.x; item < num_items;
       item += int64_t{gridDim.x} * THREADS) {
    int group = static_cast<int>(item) / packs, token = group / groups;
    int i = (static_cast<int>(item) - group * packs) * PACK, head = (group - token * groups) * HEADS;
    int count = VECTOR ? PACK : half - i, heads = min(HEADS, num_heads - head);
    const T* from = x + token * token_stride + head * head_stride + i;
    PackOf<T> first[HEADS], second[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      // What would be beyond the last head is that head once more: no branch stands between the loads.
      const T* of_head = from + min(h, heads - 1) * head_stride;
      first[h] = load_elements<VECTOR>(of_head, count);
      second[h] = load_elements<VECTOR>(of_head + half, count);
    }
    int64_t angle = int64_t{token} * half + i;
    Pack c = to_floats(load_elements<VECTOR>(cos + angle, count));
    Pack s = to_floats(load_elements<VECTOR>(sin + angle, count));
    T* to = y + (int64_t{token} * num_heads + head) * (2 * half) + i;
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      Pack a = to_floats(first[h]), b = to_floats(second[h]), turned_a, turned_b;
#pragma unroll
      for (int k = 0; k < PACK; ++k) {
        float signed_sin = s.at[k] * sign;
        turned_a.at[k] = a.at[k] * c.at[k] - b.at[k] * signed_sin;
        turned_b.at[k] = b.at[k] * c.at[k] + a.at[k] * signed_sin;
      }
      if (h >= heads) continue;
      store_pack<VECTOR>(to + h * (2 * half), turned_a, count);
      store_pack<VECTOR>(to + h * (2 * half) + half, turned_b, count);
    }
  }
}

}  // namespace

template <class T>
void rope(Rows<const T> x, const float* cos, const float* sin, bool inverse, int64_t num_heads, T* y,
          cudaStream_t stream) {
  if (x.count == 0) return;
  int64_t half = x.width / 2, tokens = x.count / num_heads;
  int64_t num_items = tokens * ((num_heads + HEADS - 1) / HEADS) * ((half + PACK - 1) / PACK);
  if (num_items > INT32_MAX || num_heads * x.width > INT32_MAX) {
    throw std::runtime_error("rope: more than 2^31 packs of pairs, or a token with as many elements");
  }
  // Rows are the heads of tokens: where they have one stride, tokens are as many of it apart as there are heads.
  int64_t head_stride = x.inner == 1 ? x.outer_stride : x.inner_stride;
  int64_t token_stride = x.inner == 1 ? num_heads * x.outer_stride : x.outer_stride;
  bool vector = aligned(x) && half % PACK == 0 && aligned(cos) && aligned(sin) && aligned(y);
  launch("rope", vector ? &rotate<T, true> : &rotate<T, false>, blocks_for(num_items, THREADS), THREADS, stream, x.data,
         token_stride, head_stride, cos, sin, inverse ? -1.0f : 1.0f, half, num_heads, num_items, y);
}

#define INSTANTIATE(T) \
  template void rope(Rows<const T>, const float*, const float*, bool, int64_t, T*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(Bf16)
INSTANTIATE(Fp16)

}  // namespace minift::cuda
