// RMS normalisation on the GPU. A row is the work of a team of threads: lanes of a warp if their registers hold it, or
// else a block. It is loaded once, and kept as it was in memory until its sum is known; what a row has beyond HELD
// packs for each thread of a block is read a second time, from cache, and so are rows that are not aligned. All that is
// held of the row and of the weight is in flight before the first of it is used: nothing is waited for after the sum.
//
// The sum over rows for dweight is made without atomics, so that its bits are the same in every run: every thread sums
// its columns in registers over the rows of its team, every block its teams, and a second kernel the blocks. Blocks
// are few there and have many rows, of which they load the next while they sum up one.

#include "rms_norm_kernels.h"

#include "elements.h"
#include "launch.h"
#include "reduce.h"

#include <algorithm>

namespace minift::cuda {
namespace {

constexpr int64_t DWEIGHT_THREADS = 1 << 16, MIN_DWEIGHT_ROWS = 4;  // of all parts; of each team in one

// How a block of THREADS works: `lanes` neighbours are a team, and each holds up to HELD packs of its row. BLOCK: all
// are one. VECTOR: all rows are aligned and made of whole packs.
template <int THREADS_, bool BLOCK_, bool VECTOR_>
struct Team {
  static constexpr int THREADS = THREADS_, HELD = !VECTOR_ ? 0 : BLOCK_ ? 2 : 4;
  static constexpr bool BLOCK = BLOCK_, VECTOR = VECTOR_;

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

template <class T, class Team>
__global__ void __launch_bounds__(Team::THREADS)
    forward(Rows<const T> x, const T* weight, float eps, T* y, float* rstd, int lanes) {
  constexpr bool VECTOR = Team::VECTOR;
  Team team(lanes);
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
template <class T, class Team, bool NEED_DWEIGHT>
constexpr int RESIDENT = NEED_DWEIGHT || sizeof(T) > 2 ? 1 : Team::BLOCK ? 1024 / Team::THREADS : 2;

template <class T>
__device__ Pack plus_residual(const Pack& dx, const Pack& dresidual) {
  Pack sum;
#pragma unroll
  for (int i = 0; i < PACK; ++i) sum.at[i] = round_to<T>(dx.at[i]) + dresidual.at[i];
  return sum;
}

// With n = x rstd and g = dy weight: dx = rstd (g - n mean(g n)), dweight = sum over rows of dy n; dx is rounded, then
// dresidual is added, if there is one. Block b writes its part of dweight to parts + b * width.
template <class T, class Team, bool NEED_DWEIGHT>
__global__ void __launch_bounds__(Team::THREADS, RESIDENT<T, Team, NEED_DWEIGHT>)
    backward(Rows<const T> dy, Rows<const T> x, const T* weight, const float* rstd, Rows<const T> dresidual, T* dx,
             float* parts, int lanes) {
  constexpr bool VECTOR = Team::VECTOR, LOADS_NEXT = NEED_DWEIGHT && Team::BLOCK && sizeof(T) == 2;
  struct Row {
    typename Team::template Held<T> dy, x, residual;
    float rstd;
  };
  Team team(lanes);
  int width = static_cast<int>(x.width);
  float* part = parts + int64_t{blockIdx.x} * width;
  Pack sums[team.HELD + !team.HELD] = {};
  bool adds = dresidual.data != nullptr;
  auto load = [&](const T* row, int i) {
    return to_floats(load_elements<VECTOR>(row + i, VECTOR ? PACK : width - i));
  };
  auto row_of_team = [&](int64_t row_of_first) { return min(row_of_first + team.index, x.count - 1); };
  auto load_row = [&](int64_t row_of_first) -> Row {
    int64_t row = row_of_team(row_of_first);
    return {team.load_held(dy[row], width), team.load_held(x[row], width),
            team.load_held(adds ? dresidual[row] : nullptr, adds ? width : 0), rstd[row]};
  };
  auto weights = team.load_held(weight, width);
  int64_t row_of_first = int64_t{blockIdx.x} * team.teams(), step = int64_t{gridDim.x} * team.teams();
  Row next;
  if (LOADS_NEXT) next = load_row(row_of_first);
  for (; row_of_first < x.count; row_of_first += step) {
    int64_t row = row_of_team(row_of_first);
    const T *dy_row = dy[row], *x_row = x[row], *residual_row = adds ? dresidual[row] : nullptr;
    Row held = LOADS_NEXT ? next : load_row(row_of_first);
    if (LOADS_NEXT && row_of_first + step < x.count) next = load_row(row_of_first + step);
    float scale = held.rstd, dot = 0.0f;
#pragma unroll
    for (int k = 0; k < team.HELD; ++k) {
      dot += scaled_dot(to_floats(held.dy.at[k]), to_floats(weights.at[k]), to_floats(held.x.at[k]));
    }
    team.for_each_other(width, [&](int i) { dot += scaled_dot(load(dy_row, i), load(weight, i), load(x_row, i)); });
    float projection = team.sum(dot) / static_cast<float>(width) * scale * scale * scale;
    held.dy.forget_floats();
    held.x.forget_floats();
    weights.forget_floats();
    if (row_of_first + team.index > row) break;  // there is no such row, nor one after it
    auto finish = [&](int i, const Pack& dy_pack, const Pack& w, const Pack& x_pack, const Pack& residual) {
      Pack dx_pack = gradient(dy_pack, w, x_pack, scale, projection);
      if (adds) dx_pack = plus_residual<T>(dx_pack, residual);
      store_pack<VECTOR>(dx + row * width + i, dx_pack, VECTOR ? PACK : width - i);
    };
    team.for_each_held(width, [&](int i, int k) {
      Pack dy_pack = to_floats(held.dy.at[k]), x_pack = to_floats(held.x.at[k]);
      finish(i, dy_pack, to_floats(weights.at[k]), x_pack, to_floats(held.residual.at[k]));
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
    __shared__ float of_teams[Team::THREADS * PACK];  // a step of the row for every team
    int step = team.step();
#pragma unroll
    for (int k = 0; k < team.HELD; ++k) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < PACK; ++i) of_teams[team.index * step + team.first + i] = sums[k].at[i];
      __syncthreads();
      for (int i = threadIdx.x; i < step && k * step + i < width; i += Team::THREADS) {
        float sum = 0.0f;
        for (int t = 0; t < team.teams(); ++t) sum += of_teams[t * step + i];
        part[k * step + i] = sum;
      }
    }
  }
}

constexpr int SUM_THREADS = 256;

// Lanes have neighbouring columns, the warps of a block take turns along the parts.
__global__ void __launch_bounds__(SUM_THREADS)
    sum_parts(const float* parts, int64_t num_parts, int64_t width, float* dweight) {
  constexpr int WARPS = SUM_THREADS / WARP;
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

void check_width(int64_t width) {
  if (width > INT32_MAX / 2) throw std::runtime_error("rms_norm: a row has more than 2^30 elements");
}

// run(Chosen<a team>{}, lanes): lanes of a warp if a row fits what they hold, else a block, of as many threads as it
// takes to hold the row, and 512 for any longer.
template <class Of>
struct Chosen {
  using Team = Of;
};
template <class Run>
void with_team(int64_t width, bool vector, const Run& run) {
  using OfWarp = Team<256, false, true>;
  int64_t packs = (width + PACK - 1) / PACK;
  if (!vector) return run(Chosen<Team<256, true, false>>{}, 256);
  for (int lanes = 1; lanes <= WARP; lanes *= 2) {
    if (packs <= lanes * OfWarp::HELD) return run(Chosen<OfWarp>{}, lanes);
  }
  if (packs <= 256) return run(Chosen<Team<128, true, true>>{}, 128);
  if (packs <= 512) return run(Chosen<Team<256, true, true>>{}, 256);
  return run(Chosen<Team<512, true, true>>{}, 512);
}

}  // namespace

template <class T>
void rms_norm(Rows<const T> x, const T* weight, float eps, T* y, float* rstd, cudaStream_t stream) {
  check_width(x.width);
  with_team(x.width, aligned(x) && aligned(y) && aligned(weight), [&](auto chosen, int lanes) {
    using Team = typename decltype(chosen)::Team;
    launch("rms_norm", &forward<T, Team>, blocks_for(x.count, Team::THREADS / lanes), Team::THREADS, stream, x, weight,
           eps, y, rstd, lanes);
  });
}

int64_t rms_norm_dweight_parts(int64_t count, int64_t width) {
  int64_t parts = 0;
  with_team(width, true, [&](auto chosen, int lanes) {
    constexpr int THREADS = decltype(chosen)::Team::THREADS;
    parts = std::min<int64_t>(DWEIGHT_THREADS / THREADS, blocks_for(count, THREADS / lanes * MIN_DWEIGHT_ROWS));
  });
  return parts;
}

template <class T>
void rms_norm_backward(Rows<const T> dy, Rows<const T> x, const T* weight, const float* rstd, Rows<const T> dresidual,
                       T* dx, float* dweight, float* parts, cudaStream_t stream) {
  check_width(x.width);
  bool vector = aligned(dy) && aligned(x) && aligned(dx) && aligned(weight);
  vector &= dresidual.data == nullptr || aligned(dresidual);
  int64_t num_parts = dweight == nullptr ? 0 : rms_norm_dweight_parts(x.count, x.width);
  with_team(x.width, vector, [&](auto chosen, int lanes) {
    using Team = typename decltype(chosen)::Team;
    auto* kernel = dweight == nullptr ? &backward<T, Team, false> : &backward<T, Team, true>;
    unsigned blocks = blocks_for(x.count, Team::THREADS / lanes);
    if (dweight != nullptr) blocks = static_cast<unsigned>(num_parts);
    launch("rms_norm_backward", kernel, blocks, Team::THREADS, stream, dy, x, weight, rstd, dresidual, dx, parts,
           lanes);
  });
  if (dweight == nullptr) return;
  launch("rms_norm_backward", sum_parts, blocks_for(x.width, WARP), SUM_THREADS, stream, parts, num_parts, x.width,
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
