// Cross entropy of rows of logits on the GPU. A row is the work of a block, which reads it once for maximum and sum (a
// thread scales its sum when it finds a larger logit: Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3) and
// once more for the gradient. With two blocks on each multiprocessor an H100 has 264 rows at work, of which its second
// level of cache holds what is read again up to vocabularies of some 100 thousand in 16-bit types.

#include "cross_entropy_kernels.h"

#include "elements.h"
#include "launch.h"
#include "reduce.h"

#include <cmath>

namespace minift::cuda {
namespace {

constexpr int THREADS = 512;
constexpr int UNROLLED = 4;  // packs of a thread that are loaded before the first is used

// A row that starts anywhere: `head` elements up to where packs are aligned, the packs, and a tail. (Vocabularies are
// often no multiple of PACK.)
struct RowPacks {
  int64_t head, packs;
  int edges;  // elements in head and tail, fewer than 2 * PACK

  template <class T>
  __device__ RowPacks(const T* row, int64_t width) {
    head = min((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T), static_cast<uint64_t>(width));
    packs = (width - head) / PACK;
    edges = static_cast<int>(width - packs * PACK);
  }
  // Where in the row an edge is, and a pack begins.
  __device__ int64_t of_edge(int i) const { return i < head ? i : i + packs * PACK; }
  __device__ int64_t of_pack(int64_t i) const { return head + i * PACK; }
};

// visit(where, pack) for the calling thread's packs of a row.
template <class T, class Visit>
__device__ __forceinline__ void for_each_pack(const RowPacks& places, const T* row, const Visit& visit) {
  for (int64_t first = threadIdx.x; first < places.packs; first += THREADS * UNROLLED) {
    PackOf<T> loaded[UNROLLED];
#pragma unroll
    for (int u = 0; u < UNROLLED; ++u) {
      // What would be past the end is the first once more: no branch stands between the loads, and nobody reads what
      // another thread may be writing.
      int64_t pack = first + u * THREADS < places.packs ? first + u * THREADS : first;
      loaded[u] = load_elements<true>(row + places.of_pack(pack), PACK);
    }
#pragma unroll
    for (int u = 0; u < UNROLLED; ++u) {
      if (first + u * THREADS < places.packs) visit(places.of_pack(first + u * THREADS), to_floats(loaded[u]));
    }
  }
}

// What logits are subtracted: their maximum, but zero if that is -infinity, whose powers are zero and not NaN.
__device__ float base_of(float largest) { return largest == -INFINITY ? 0.0f : largest; }

template <class T>
__global__ void __launch_bounds__(THREADS, 2)
    cross_entropy_rows(T* logits, const int64_t* targets, int64_t count, int64_t width, bool need_gradient,
                       float* losses) {
  for (int64_t index = blockIdx.x; index < count; index += gridDim.x) {
    T* row = logits + index * width;
    int64_t target = targets[index];
    bool in_vocabulary = target >= 0 && target < width;
    float of_target = in_vocabulary && threadIdx.x == 0 ? to_float(row[target]) : 0.0f;
    RowPacks places(row, width);
    bool has_edge = threadIdx.x < places.edges;

    float largest = has_edge ? to_float(row[places.of_edge(threadIdx.x)]) : -INFINITY;
    float sum = has_edge ? expf(largest - base_of(largest)) : 0.0f;  // of e^(logit - largest); NaN if the logit is
    for_each_pack(places, row, [&](int64_t, const Pack& pack) {
      float before = largest;
#pragma unroll
      for (int i = 0; i < PACK; ++i) largest = fmaxf(largest, pack.at[i]);
      float base = base_of(largest);
      sum *= expf(before - base);
#pragma unroll
      for (int i = 0; i < PACK; ++i) sum += expf(pack.at[i] - base);
    });
    float base = base_of(reduce_block<Max, THREADS>(largest));
    float total = reduce_block<Sum, THREADS>(sum * expf(largest - base));
    if (!in_vocabulary) total = NAN;
    if (threadIdx.x == 0) losses[index] = logf(total) + (base - of_target);
    if (!need_gradient) continue;

    float factor = 1.0f / total;
    auto gradient = [&](int64_t i, float logit) {
      return (expf(logit - base) - (i == target ? total : 0.0f)) * factor;
    };
    if (has_edge) {
      int64_t i = places.of_edge(threadIdx.x);
      row[i] = from_float<T>(gradient(i, to_float(row[i])));
    }
    for_each_pack(places, row, [&](int64_t i, const Pack& pack) {
      Pack gradients;
#pragma unroll
      for (int k = 0; k < PACK; ++k) gradients.at[k] = gradient(i + k, pack.at[k]);
      store_pack<true>(row + i, gradients, PACK);
    });
  }
}

}  // namespace

template <class T>
void cross_entropy(T* logits, const int64_t* targets, int64_t count, int64_t width, bool need_gradient, float* losses,
                   cudaStream_t stream) {
  launch("cross_entropy_", cross_entropy_rows<T>, blocks_for(count, 1), THREADS, stream, logits, targets, count, width,
         need_gradient, losses);
}

template void cross_entropy(float*, const int64_t*, int64_t, int64_t, bool, float*, cudaStream_t);
template void cross_entropy(Bf16*, const int64_t*, int64_t, int64_t, bool, float*, cudaStream_t);
template void cross_entropy(Fp16*, const int64_t*, int64_t, int64_t, bool, float*, cudaStream_t);

}  // namespace minift::cuda
