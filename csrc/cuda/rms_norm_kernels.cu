// RMS normalisation on the GPU. A row is the work of a team of threads: lanes of a warp if their registers hold it, or
// else a block. It is loaded once, and kept as it was in memory until its sum is known; what a row has beyond HELD
// packs for each thread of a block is read a second time, from cache, and so are rows that are not aligned. All that is
// held of the row and of the weight is in flight before the first of it is used: nothing is waited for after the sum.
//
// The sum over rows for dweight is made without atomics, so that its bits are the same in every run: every thread sums
// its columns in registers over the rows of its team, every block its teams, and a second kernel the blocks.

#include "rms_norm_kernels.h"

#include "elements.h"
#include "launch.h"
#include "reduce.h"

#include <algorithm>

namespace minift::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int64_t MAX_DWEIGHT_PARTS = 512, MIN_DWEIGHT_ROWS = 4;  // rows: of each team in a part

// How a block works: `lanes` neighbours are a team, and each holds up to HELD packs of its row. BLOCK: all are one.
// VECTOR: all rows are aligned and made of whole packs.
template <bool BLOCK, bool VECTOR>
struct Team {
  static constexpr int HELD = !VECTOR ? 0 : BLOCK ? 2 : 4;

  int lanes, index, first;  // its number in the block, and where in the row the calling thread's packs begin

  __device__ explicit Team(int lanes_of_warp) {
    lanes = BLOCK ? THREADS : lanes_of_warp;
    index = threadIdx.x / lanes;
    first = threadIdx.x % lanes * PACK;
  }
  __device__ int teams() const { return THREADS / lanes; }
  __device__ int step() const { return lanes * PACK; }  // from one pack of a thread to its next
  __device__ float sum(float value) const {
    if constexpr (BLOCK) return reduce_block<Sum, THREADS>(value);
    return reduce_warp<Sum>(value, lanes);
  }

  // The packs of a row that the calling thread holds: zeros past its end, which add nothing to a sum.
  template <class T>
  struct Held {
    PackOf<T> at[HELD + !HELD];

    __device__ void forget_floats() {
#pragma unroll
      for (int k = 0; k < HELD; ++k) at[k].forget_floats();
    }
  };

  template <class T>
  __device__ Held<T> load_held(const T* row, int width) const {
    Held<T> held;
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
      int i = first + k * step();
      held.at[k] = i < width ? load_elements<true>(row + i, PACK) : PackOf<T>{};
    }
    return held;
  }

  // visit(i, k) for each that is in the row, and visit(i) for each of the others: i is where in the row it begins.
  template <class Visit>
  __device__ void for_each_held(int width, const Visit& visit) const {
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
      if (int i = first + k * step(); i < width) visit(i, k);
    }
  }
  template <class Visit>
  __device__ void for_each_other(int width, const Visit& visit) const {
#pragma unroll 1
    for (int i = first + HELD * step(); BLOCK && i < width; i += step()) visit(i);
  }
};

__device__ float sum_of_squares(const Pack& x) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PACK; ++i) sum += x.at[i] * x.at[i];
  return sum;
}

template <class T>
__device__ Pack normalised(const Pack& x, const Pack& weight, float scale) {
  Pack y;
#pragma unroll
  // Hugging Face rounds the normalised row to T before it multiplies by the weight.
  for (int i = 0; i < PACK; ++i) y.at[i] = round_to<T>(x.at[i] * scale) * weight.at[i];
  return y;
}

template <class T, bool BLOCK, bool VECTOR>
__global__ void __launch_bounds__(THREADS)
    forward(Rows<const T> x, const T* weight, float eps, T* y, float* rstd, int lanes) {
  Team<BLOCK, VECTOR> team(lanes);
  int width = static_cast<int>(x.width);
  auto load = [&](const T* row, int i) {
    return to_floats(load_elements<VECTOR>(row + i, VECTOR ? PACK : width - i));
  };
  auto weights = team.load_held(weight, width);
  // Every team of a warp goes through the loop equally often, for all lanes shuffle together.
  for (int64_t row_of_first = int64_t{blockIdx.x} * team.teams(); row_of_first < x.count;
       row_of_first += int64_t{gridDim.x} * team.teams()) {
    int64_t row = min(row_of_first + team.index, x.count - 1);
    const T* x_row = x[row];
    auto held = team.load_held(x_row, width);
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < team.HELD; ++k) sum += sum_of_squares(to_floats(held.at[k]));
    team.for_each_other(width, [&](int i) { sum += sum_of_squares(load(x_row, i)); });
    float scale = 1.0f / sqrtf(team.sum(sum) / static_cast<float>(width) + eps);
    held.forget_floats();
    weights.forget_floats();
    if (row_of_first + team.index > row) continue;  // there is no such row
    if (team.first == 0) rstd[row] = scale;
    auto finish = [&](int i, const Pack& elements, const Pack& w) {
      store_pack<VECTOR>(y + row * width + i, normalised<T>(elements, w, scale), VECTOR ? PACK : width - i);
    };
    team.for_each_held(width, [&](int i, int k) { finish(i, to_floats(held.at[k]), to_floats(weights.at[k])); });
    team.for_each_other(width, [&](int i) { finish(i, load(x_row, i), load(weight, i)); });
  }
}

__device__ float scaled_dot(const Pack& dy, const Pack& weight, const Pack& x) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PACK; ++i) sum += dy.at[i] * weight.at[i] * x.at[i];
  return sum;
}

__device__ Pack gradient(const Pack& dy, const Pack& weight, const Pack& x, float scale, float projection) {
  Pack dx;
#pragma unroll
  for (int i = 0; i < PACK; ++i) dx.at[i] = dy.at[i] * weight.at[i] * scale - x.at[i] * projection;
  return dx;
}

__device__ void add_dweight(Pack& dweight, const Pack& dy, const Pack& x, float scale) {
#pragma unroll
  for (int i = 0; i < PACK; ++i) dweight.at[i] += dy.at[i] * (x.at[i] * scale);
}

// Blocks of a multiprocessor at once, at least: what their registers allow without a spill. A row in flight hides the
// sum of another.
template <class T, bool BLOCK, bool NEED_DWEIGHT>
constexpr int RESIDENT = NEED_DWEIGHT || sizeof(T) > 2 ? 1 : BLOCK ? 4 : 2;

template <class T>
__device__ Pack plus_residual(const Pack& dx, const Pack& dresidual) {
  Pack sum;
#pragma unroll
  for (int i = 0; i < PACK; ++i) sum.at[i] = round_to<T>(dx.at[i]) + dresidual.at[i];
  return sum;
}

// With n = x rstd and g = dy weight: dx = rstd (g - n mean(g n)), dweight = sum over rows of dy n; dx is rounded, then
// dresidual is added, if there is one.
// Block b writes its part of dweight to parts + b * width.
template <class T, bool BLOCK, bool VECTOR, bool NEED_DWEIGHT>
__global__ void __launch_bounds__(THREADS, RESIDENT<T, BLOCK, NEED_DWEIGHT>)
    backward(Rows<const T> dy, Rows<const T> x, const T* weight, const float* rstd, Rows<const T> dresidual, T* dx,
             float* parts, int lanes) {
  Team<BLOCK, VECTOR> team(lanes);
  int width = static_cast<int>(x.width);
  float* part = parts + int64_t{blockIdx.x} * width;
  Pack sums[team.HELD + !team.HELD] = {};
  auto load = [&](const T* row, int i) {
    return to_floats(load_elements<VECTOR>(row + i, VECTOR ? PACK : width - i));
  };
  bool adds = dresidual.data != nullptr;
  auto weights = team.load_held(weight, width);
  for (int64_t row_of_first = int64_t{blockIdx.x} * team.teams(); row_of_first < x.count;
       row_of_first += int64_t{gridDim.x} * team.teams()) {
    int64_t row = min(row_of_first + team.index, x.count - 1);
    const T *dy_row = dy[row], *x_row = x[row], *residual_row = adds ? dresidual[row] : nullptr;
    auto held_dy = team.load_held(dy_row, width), held_x = team.load_held(x_row, width);
    auto held_residual = team.load_held(residual_row, adds ? width : 0);
    float scale = rstd[row], dot = 0.0f;
#pragma unroll
    for (int k = 0; k < team.HELD; ++k) {
      dot += scaled_dot(to_floats(held_dy.at[k]), to_floats(weights.at[k]), to_floats(held_x.at[k]));
    }
    team.for_each_other(width, [&](int i) { dot += scaled_dot(load(dy_row, i), load(weight, i), load(x_row, i)); });
    float projection = team.sum(dot) / static_cast<float>(width) * scale * scale * scale;
    held_dy.forget_floats();
    held_x.forget_floats();
    weights.forget_floats();
    if (row_of_first + team.index > row) continue;
    auto finish = [&](int i, const Pack& dy_pack, const Pack& w, const Pack& x_pack, const Pack& residual) {
      Pack dx_pack = gradient(dy_pack, w, x_pack, scale, projection);
      if (adds) dx_pack = plus_residual<T>(dx_pack, residual);
      store_pack<VECTOR>(dx + row * width + i, dx_pack, VECTOR ? PACK : width - i);
    };
    team.for_each_held(width, [&](int i, int k) {
      Pack dy_pack = to_floats(held_dy.at[k]), x_pack = to_floats(held_x.at[k]);
      finish(i, dy_pack, to_floats(weights.at[k]), x_pack, to_floats(held_residual.at[k]));
      if (NEED_DWEIGHT) add_dweight(sums[k], dy_pack, x_pack, scale);
    });
    team.for_each_other(width, [&](int i) {
      Pack dy_pack = load(dy_row, i), x_pack = load(x_row, i);
      finish(i, dy_pack, load(weight, i), x_pack, adds ? load(residual_row, i) : Pack{});
      if (!NEED_DWEIGHT) return;
      Pack sum = row_of_first == blockIdx.x ? Pack{} : to_floats(load_elements<false>(part + i, width - i));
      add_dweight(sum, dy_pack, x_pack, scale);
      store_pack<false>(part + i, sum, width - i);
    });
  }
  if constexpr (NEED_DWEIGHT) {
    __shared__ float of_teams[THREADS * PACK];  // a step of the row for every team
    int step = team.step();
#pragma unroll
    for (int k = 0; k < team.HELD; ++k) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < PACK; ++i) of_teams[team.index * step + team.first + i] = sums[k].at[i];
      __syncthreads();
      for (int i = threadIdx.x; i < step && k * step + i < width; i += THREADS) {
        float sum = 0.0f;
        for (int t = 0; t < team.teams(); ++t) sum += of_teams[t * step + i];
        part[k * step + i] = sum;
      }
    }
  }
}

// Lanes have neighbouring columns, the warps of a block take turns along the parts.
__global__ void __launch_bounds__(THREADS)
    sum_parts(const float* parts, int64_t num_parts, int64_t width, float* dweight) {
  constexpr int WARPS = THREADS / WARP;
  __shared__ float of_warps[WARPS][WARP];
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  for (int64_t first = int64_t{blockIdx.x} * WARP; first < width; first += int64_t{gridDim.x} * WARP) {
    int64_t column = first + lane;
    float sum = 0.0f;
    if (column < width) {
#pragma unroll 8
      for (int64_t i = warp; i < num_parts; i += WARPS) sum += parts[i * width + column];
    }
    of_warps[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < width) {
#pragma unroll
      for (int w = 1; w < WARPS; ++w) sum += of_warps[w][lane];
      dweight[column] = sum;
    }
    __syncthreads();
  }
}

// Lanes of a warp that hold a row of this width; THREADS if it takes a block.
int lanes_for(int64_t width) {
  int lanes = 1;
  while (lanes <= WARP && lanes * PACK * Team<false, true>::HELD < width) lanes *= 2;
  return lanes <= WARP ? lanes : THREADS;
}

void check_width(int64_t width) {
  if (width > INT32_MAX / 2) throw std::runtime_error("rms_norm: a row has more than 2^30 elements");
}

template <class T, bool NEED_DWEIGHT>
auto* backward_kernel(int lanes, bool vector) {
  return !vector         ? &backward<T, true, false, NEED_DWEIGHT>
         : lanes <= WARP ? &backward<T, false, true, NEED_DWEIGHT>
                         : &backward<T, true, true, NEED_DWEIGHT>;
}

}  // namespace

template <class T>
void rms_norm(Rows<const T> x, const T* weight, float eps, T* y, float* rstd, cudaStream_t stream) {
  check_width(x.width);
  bool vector = aligned(x) && aligned(y) && aligned(weight);
  int lanes = vector ? lanes_for(x.width) : THREADS;
  auto* kernel = !vector         ? &forward<T, true, false>
                 : lanes <= WARP ? &forward<T, false, true>
                                 : &forward<T, true, true>;
  launch("rms_norm", kernel, blocks_for(x.count, THREADS / lanes), THREADS, stream, x, weight, eps, y, rstd, lanes);
}

int64_t rms_norm_dweight_parts(int64_t count, int64_t width) {
  return std::min<int64_t>(MAX_DWEIGHT_PARTS, blocks_for(count, THREADS / lanes_for(width) * MIN_DWEIGHT_ROWS));
}

template <class T>
void rms_norm_backward(Rows<const T> dy, Rows<const T> x, const T* weight, const float* rstd, Rows<const T> dresidual,
                       T* dx, float* dweight, float* parts, cudaStream_t stream) {
  check_width(x.width);
  bool vector = aligned(dy) && aligned(x) && aligned(dx) && aligned(weight);
  vector &= dresidual.data == nullptr || aligned(dresidual);
  int lanes = vector ? lanes_for(x.width) : THREADS;
  auto run = [&](auto* kernel, int64_t blocks) {
    launch("rms_norm_backward", kernel, static_cast<unsigned>(blocks), THREADS, stream, dy, x, weight, rstd, dresidual,
           dx, parts, lanes);
  };
  if (dweight == nullptr) {
    run(backward_kernel<T, false>(lanes, vector), blocks_for(x.count, THREADS / lanes));
    return;
  }
  int64_t num_parts = rms_norm_dweight_parts(x.count, x.width);
  run(backward_kernel<T, true>(lanes, vector), num_parts);
  launch("rms_norm_backward", sum_parts, blocks_for(x.width, WARP), THREADS, stream, parts, num_parts, x.width,
         dweight);
}

#define INSTANTIATE(T)                                                                                           \
  template void rms_norm(Rows<const T>, const T*, float, T*, float*, cudaStream_t);                              \
  template void rms_norm_backward(Rows<const T>, Rows<const T>, const T*, const float*, Rows<const T>, T*, float*, \
                                  float*, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(Bf16)
INSTANTIATE(Fp16)

}  // namespace minift::cuda
