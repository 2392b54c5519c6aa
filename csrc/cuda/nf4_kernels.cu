// Quantising to NF4 and back on the GPU. Both are bound by memory: one pass, 16 bytes an access, nothing in between.
//
// The scale of a block is expanded in registers, double-quantised or not: one launch.

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

// Packs of a thread, of which everything is loaded before the first is stored.
constexpr int UNROLLED = 4;

// VECTOR: rows are whole packs, and aligned; so are codes, four bytes a pack.
template <class T, bool VECTOR>
__global__ void __launch_bounds__(THREADS)
    dequantize(const uint8_t* codes, nf4::Scales scales, int block_size_log2, T* out, uint32_t packs_per_row,
               int64_t num_packs, int64_t width, int64_t start, int64_t stride,
               const __grid_constant__ Table table) {
  __shared__ float codebook[16];
  fill(codebook, table);
  int64_t step = int64_t{THREADS} * UNROLLED;
  for (int64_t first = blockIdx.x * step + threadIdx.x; first < num_packs; first += gridDim.x * step) {
    int64_t rows[UNROLLED], columns[UNROLLED], blocks[UNROLLED];
    uint32_t four_bytes[UNROLLED];
    float scale[UNROLLED];
#pragma unroll
    for (int u = 0; u < UNROLLED; ++u) {
      // What would be past the end is the first once more: no branch stands between the loads.
      int64_t pack = first + u * THREADS < num_packs ? first + u * THREADS : first;
      rows[u] = packs_per_row == 0 ? 0 : static_cast<uint32_t>(pack) / packs_per_row;
      columns[u] = (pack - rows[u] * packs_per_row) * PACK;
      int64_t element = start + rows[u] * stride + columns[u];
      blocks[u] = element >> block_size_log2;
      int64_t num_bytes = VECTOR ? PACK / 2 : (width - columns[u] + 1) / 2;
      four_bytes[u] = load_elements<VECTOR, 4>(codes + element / 2, num_bytes).words[0];
    }
    scales.gather(blocks, scale);
#pragma unroll
    for (int u = 0; u < UNROLLED; ++u) {
      if (first + u * THREADS >= num_packs) break;
      Pack pack;
#pragma unroll
      for (int k = 0; k < PACK; k += 2) {
        uint8_t byte = static_cast<uint8_t>(four_bytes[u] >> (4 * k));
        pack.at[k] = __fmul_rn(codebook[nf4::even_code(byte)], scale[u]);
        pack.at[k + 1] = __fmul_rn(codebook[nf4::odd_code(byte)], scale[u]);
      }
      store_pack<VECTOR>(out + rows[u] * width + columns[u], pack, VECTOR ? PACK : width - columns[u]);
    }
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
  launch("nf4_dequantize", vector ? &dequantize<T, true> : &dequantize<T, false>,
         blocks_for(num_packs, THREADS * UNROLLED), THREADS, stream, codes, scales, log2_of(block_size), out,
         rows > 1 ? static_cast<uint32_t>(packs_per_row) : 0u, num_packs, width, start, stride, Table(nf4::CODEBOOK));
}

#define INSTANTIATE(T)                                                                                            \
  template void nf4_quantize(const T*, int64_t, int64_t, uint8_t*, float*, cudaStream_t);                         \
  template void nf4_dequantize(const uint8_t*, nf4::Scales, int64_t, T*, int64_t, int64_t, int64_t, int64_t,      \
                               cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(Bf16)
INSTANTIATE(Fp16)

}  // namespace minift::cuda
