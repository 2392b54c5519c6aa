// The narrow side of low-rank products on its way into shared memory.

#pragma once

#include "low_rank_work.h"
#include "tensor_cores.h"

namespace minift::cuda::low_rank {

// LENGTH x TILE elements of each of up to TILES tiles, on their way through registers: of factors, or of narrow
// matrices. In shared memory 32 elements along k are neighbours, then come the other ranks: lane 4 g + q finds, of rank
// g, elements 8 q .. 8 q + 7 of these 32 in one access of 16 bytes, which is what two products take.
template <bool VECTOR, int TILES, int LENGTH>
struct Operands {
  static constexpr int ALONG = 32, FOURS = LENGTH * TILE / QUAD;  // of a tile
  // A job is four lines of eight elements.
  static constexpr int JOBS = LENGTH * TILE / (4 * PACK), ROUNDS = TILES * JOBS / THREADS;
  Eight lines[ROUNDS][4];

  __device__ static int tile(int round) { return (threadIdx.x + round * THREADS) / JOBS; }

  // Element (k, rank) at from[k * stride + rank] if ranks are adjacent, else at from[k + rank * stride].
  __device__ __forceinline__ void load(int round, const Bf16* from, int64_t stride, bool ranks_adjacent, int count,
                                       int ranks) {
    int job = threadIdx.x % JOBS;
    if (ranks_adjacent) {
      int rank = job % 2 * PACK, k = job / 2 * QUAD;
      load_lines<VECTOR>(lines[round], from + k * stride + rank, stride, count - k, ranks - rank);
    } else {
      int rank = first_rank(job), k = first_k(job), lines_left = (ranks - rank + LINES_APART - 1) / LINES_APART;
      load_lines<VECTOR>(lines[round], from + rank * stride + k, LINES_APART * stride, lines_left, count - k);
    }
  }
  __device__ __forceinline__ void store(int round, bool ranks_adjacent, Four (*shared)[FOURS]) const {
    int job = threadIdx.x % JOBS;
    Four* to = shared[tile(round)];
    if (ranks_adjacent) {
      int rank = job % 2 * PACK, k = job / 2 * QUAD;
#pragma unroll
      for (int i = 0; i < PACK; ++i) to[place(k, rank + i)] = across(lines[round], i);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int at = place(first_k(job), first_rank(job) + i * LINES_APART);
        *reinterpret_cast<Eight*>(to + at) = lines[round][i];
      }
    }
  }

  // Of element (k, rank), where k is a multiple of four.
  __device__ static int place(int k, int rank) {
    return k / ALONG * (TILE * ALONG / QUAD) + rank * (ALONG / QUAD) + k % ALONG / QUAD;
  }

 private:
  // Lines of a job are not adjacent, for then lanes beside each other have others, in other banks of shared memory.
  static constexpr int LINES_APART = TILE / 4;

  __device__ static int first_rank(int job) { return job / 4 % LINES_APART; }
  __device__ static int first_k(int job) { return (job % 4 + job / 16 * 4) * PACK; }
};

}  // namespace minift::cuda::low_rank
