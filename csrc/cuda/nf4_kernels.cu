// Quantising to NF4 and back on the GPU. Both are bound by memory: one pass, 16 bytes an access, nothing in between.
//
// The scale of a block is expanded in registers, double-quantised or not: one launch.
//
// Dequantising, a warp loads its next codes and scales while it writes. It has two turns, where there is more to do
// than the GPU holds at once: if blocks had all the rest, those of slower multiprocessors would end last.

#include "nf4_kernels.h"

#include "elements.h"
#include "launch.h"
#include "nf4_tables.h"
#include "reduce.h"

namespace minift::cuda {
namespace {

constexpr int THREADS = 256;

// The largest magnitude as bits: infinity is larger than every number, and a NaN than that.
__device__ uint32_t magnitude_bits(float value) { return __float_as_uint(value) & 0x7fffffffu; }

// The last block, if it is incomplete. Unlike complete ones bitsandbytes divides it (instead of multiplying by the
// reciprocal) and stores what it divided by. One thread: there is one such block in a weight.
template <class T>
__device__ void quantize_incomplete(const T* elements, int64_t count, const float (&thresholds)[16], uint8_t* codes,
                                    float* absmax) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits = Max()(bits, magnitude_bits(to_float(elements[i])));
  float scale = __uint_as_float(bits);
  scale = scale > nf4::SMALLEST_DIVISOR || scale != scale ? scale : nf4::SMALLEST_DIVISOR;
  *absmax = scale;
  if (codes == nullptr) return;
  for (int64_t i = 0; i < count; i += 2) {
    float odd = i + 1 < count ? to_float(elements[i + 1]) : 0.0f;
    codes[i / 2] = nf4::pack(nf4::code_of(__fdiv_rn(to_float(elements[i]), scale), thresholds),
                             nf4::code_of(__fdiv_rn(odd, scale), thresholds));
  }
}

// A block of the weight is the work of `lanes` neighbours, which read it a second time from cache if it is larger than
// a pack for each.
template <class T>
__global__ void __launch_bounds__(THREADS)
    quantize(const T* weight, int64_t n, int64_t block_size, int lanes, bool vector,
             const __grid_constant__ Table table, uint8_t* codes, float* absmax) {
  __shared__ float thresholds[16];
  fill(thresholds, table);
  int64_t complete = n / block_size, teams_per_block = THREADS / lanes;
  int lane = threadIdx.x % lanes;
  // Every team of a warp goes through the loop equally often, for all lanes shuffle together.
  for (int64_t first = blockIdx.x * teams_per_block; first < complete; first += gridDim.x * teams_per_block) {
    int64_t block = first + threadIdx.x / lanes;
    bool mine = block < complete;
    const T* elements = weight + block * block_size;
    uint32_t bits = 0;
    for (int64_t i = lane * PACK; mine && i < block_size; i += lanes * PACK) {
      Pack pack = load_pack(elements + i, PACK, vector);
#pragma unroll
      for (int k = 0; k < PACK; ++k) bits = Max()(bits, magnitude_bits(pack.at[k]));
    }
    float scale = __uint_as_float(reduce_warp<Max>(bits, lanes));
    if (!mine) continue;
    if (lane == 0) absmax[block] = scale;
    if (codes == nullptr) continue;
    float inverse = __fdiv_rn(1.0f, scale > nf4::SMALLEST_DIVISOR ? scale : nf4::SMALLEST_DIVISOR);
    for (int64_t i = lane * PACK; i < block_size; i += lanes * PACK) {
      Pack pack = load_pack(elements + i, PACK, vector);
      uint32_t four_bytes = 0;  // the first in the lowest bits
#pragma unroll
      for (int k = 0; k < PACK; k += 2) {
        uint32_t even = nf4::code_of(__fmul_rn(pack.at[k], inverse), thresholds);
        uint32_t odd = nf4::code_of(__fmul_rn(pack.at[k + 1], inverse), thresholds);
        four_bytes |= uint32_t{nf4::pack(even, odd)} << (4 * k);
      }
      *reinterpret_cast<uint32_t*>(codes + (block * block_size + i) / 2) = four_bytes;
    }
  }
  if (int64_t done = complete * block_size; done < n && blockIdx.x == 0 && threadIdx.x == 0) {
    quantize_incomplete(weight + done, n - done, thresholds, codes == nullptr ? nullptr : codes + done / 2,
                        absmax + complete);
  }
}

constexpr int UNROLLED = 4, PACKS_OF_WARP = UNROLLED * WARP;  // at a time
constexpr int RESIDENT = 6, TURNS = 2;                        // blocks of a multiprocessor; of a warp, if more wait

// What is dequantised: elements of rows, which follow each other in the result, and `gap` apart in the weight.
struct Packs {
  int64_t count, elements, start, gap;
  uint32_t per_row;  // 0: there is one row
  int block_size_log2;

  __device__ int64_t element(int64_t pack) const {
    return start + pack * PACK + (per_row == 0 ? 0 : static_cast<uint32_t>(pack) / per_row * gap);
  }
  __device__ int64_t elements_from(int64_t pack) const { return elements - pack * PACK; }
  __device__ int from(int64_t first) const { return static_cast<int>(min(count - first, int64_t{PACKS_OF_WARP})); }
  __device__ int packs_of_block_log2() const { return block_size_log2 - 3; }
};
static_assert(PACK == 1 << 3 && nf4::SMALLEST_BLOCK_SIZE * WARP >= PACKS_OF_WARP * PACK);

// What a lane needs for the packs of its warp from `first` on: codes of its own, and the scale of one of their blocks,
// for blocks begin in all rows at multiples of as many packs.
struct Loaded {
  uint32_t codes[UNROLLED];
  nf4::Scales::Entry entry;

  template <bool VECTOR>
  __device__ void load(const uint8_t* from, const nf4::Scales& scales, const Packs& packs, int64_t first) {
    int lane = threadIdx.x % WARP, last = packs.from(first) - 1;
    int64_t of_entry = first + min(lane << packs.packs_of_block_log2(), last);
    entry = scales.entry(packs.element(of_entry) >> packs.block_size_log2);
#pragma unroll
    for (int u = 0; u < UNROLLED; ++u) {
      // What would be past the end is the last once more: no branch stands between the loads.
      int64_t pack = first + min(u * WARP + lane, last);
      int64_t num_bytes = VECTOR ? PACK / 2 : (packs.elements_from(pack) + 1) / 2;
      codes[u] = load_elements<VECTOR, 4>(from + packs.element(pack) / 2, num_bytes).words[0];
    }
  }
};

// VECTOR: all packs are whole and aligned; so are their codes, four bytes each.
template <class T, bool VECTOR>
__global__ void __launch_bounds__(THREADS, RESIDENT)
    dequantize(const uint8_t* codes, nf4::Scales scales, T* out, Packs packs, const __grid_constant__ Table table) {
  __shared__ float codebook[16];
  int lane = threadIdx.x % WARP;
  int64_t first = (int64_t{blockIdx.x} * THREADS + threadIdx.x) / WARP * PACKS_OF_WARP;
  int64_t step = int64_t{gridDim.x} * (THREADS / WARP) * PACKS_OF_WARP;
  Loaded now;
  if (first < packs.count) now.load<VECTOR>(codes, scales, packs, first);
  fill(codebook, table);
  for (; first < packs.count; first += step) {
    Loaded next = now;
    if (first + step < packs.count) next.load<VECTOR>(codes, scales, packs, first + step);
    int of_warp = packs.from(first);
    float scale_of_block = scales.scale(now.entry), scale[UNROLLED];
#pragma unroll
    for (int u = 0; u < UNROLLED; ++u) {
      scale[u] = __shfl_sync(ALL_LANES, scale_of_block, (u * WARP + lane) >> packs.packs_of_block_log2());
    }
#pragma unroll
    for (int u = 0; u < UNROLLED; ++u) {
      int64_t pack = first + u * WARP + lane;
      if (u * WARP + lane >= of_warp) break;
      Pack values;
#pragma unroll
      for (int k = 0; k < PACK; k += 2) {
        uint8_t byte = static_cast<uint8_t>(now.codes[u] >> (4 * k));
        values.at[k] = __fmul_rn(codebook[nf4::even_code(byte)], scale[u]);
        values.at[k + 1] = __fmul_rn(codebook[nf4::odd_code(byte)], scale[u]);
      }
      store_pack<VECTOR>(out + pack * PACK, values, VECTOR ? PACK : packs.elements_from(pack));
    }
    now = next;
  }
}

}  // namespace

template <class T>
void nf4_quantize(const T* weight, int64_t n, int64_t block_size, uint8_t* codes, float* absmax, cudaStream_t stream) {
  int lanes = static_cast<int>(std::min<int64_t>(WARP, block_size / PACK));
  unsigned blocks = blocks_for((n + block_size - 1) / block_size, THREADS / lanes);
  launch("nf4_quantize", quantize<T>, blocks, THREADS, stream, weight, n, block_size, lanes, aligned(weight),
         Table(nf4::THRESHOLDS), codes, absmax);
}

template <class T>
void nf4_dequantize(const uint8_t* codes, nf4::Scales scales, int64_t block_size, T* out, int64_t rows, int64_t width,
                    int64_t start, int64_t stride, cudaStream_t stream) {
  if (stride == width) {  // rows that follow each other are one row
    width *= rows;
    rows = 1;
  }
  int64_t packs_per_row = (width + PACK - 1) / PACK, num_packs = rows * packs_per_row;
  if (rows > 1 && num_packs > UINT32_MAX) {
    throw std::runtime_error("nf4_dequantize: more than 2^35 elements in several rows");
  }
  bool vector = width % PACK == 0 && aligned(out) && reinterpret_cast<uintptr_t>(codes) % 4 == 0;
  uint32_t per_row = rows > 1 ? static_cast<uint32_t>(packs_per_row) : 0u;
  Packs packs{num_packs, rows * width, start, stride - width, per_row, log2_of(block_size)};
  unsigned blocks = std::max(std::min(blocks_for(num_packs, THREADS * UNROLLED), resident_blocks(RESIDENT)),
                             blocks_for(num_packs, THREADS * UNROLLED * TURNS));
  launch("nf4_dequantize", vector ? &dequantize<T, true> : &dequantize<T, false>, blocks, THREADS, stream, codes,
         scales, out, packs, Table(nf4::CODEBOOK));
}

#define INSTANTIATE(T)                                                                                            \
  template void nf4_quantize(const T*, int64_t, int64_t, uint8_t*, float*, cudaStream_t);                         \
  template void nf4_dequantize(const uint8_t*, nf4::Scales, int64_t, T*, int64_t, int64_t, int64_t, int64_t,      \
                               cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(Bf16)
INSTANTIATE(Fp16)

}  // namespace minift::cuda
