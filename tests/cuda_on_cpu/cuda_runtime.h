// As much of CUDA as minift's kernels use, on the processor: `g++ -x c++ -I tests/cuda_on_cpu csrc/cuda/x_kernels.cu`.
//
// A kernel runs block by block; each of its threads is a coroutine that gives way where threads meet: at barriers and
// in what a warp does together. So every index, tail, shuffle and barrier is what the GPU would execute, and values are
// bit for bit those of IEEE fp32 arithmetic. Stricter than a GPU: a barrier that a thread never reaches, a lane that is
// missing in a shuffle, a misaligned 16-byte access, an index beyond an array in shared memory, and an access to memory
// that the process has not (library.py puts tensors next to such memory) are errors here, and so is a race (races.h).
// Threads take turns in an order drawn anew for every block, and some warps run far ahead of others, so that a
// forgotten barrier shows in the results, too. Not here: speed, atomics, dynamic shared memory, and more than one
// dimension of threads.

#pragma once

#include "races.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// Set by the linker: where static variables are, of which kernels use those in shared memory.
extern "C" __attribute__((visibility("hidden"))) char __bss_start, _end;

namespace cuda_on_cpu {

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 1 << 17;

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("cuda on cpu: " + what); }

// Where `expected` threads meet, again and again. Two are used in turns: some threads may already be at the next
// meeting while others have not yet left this one.
struct Meeting {
  int64_t number = -1;
  unsigned arrived = 0;
  uint64_t shown[WARP] = {};  // by the lanes of a warp

  void arrive(int64_t at) {
    if (number != at) {
      number = at;
      arrived = 0;
    }
    ++arrived;
  }
};

struct Thread {
  bool started = false, done = false;
  ucontext_t start;
  jmp_buf context;
  int64_t barriers = 0, shuffles = 0;  // that it has been at
};

struct Block {
  std::function<void()> kernel;
  uint32_t number;  // in the grid
  std::vector<Thread> threads;
  std::vector<Meeting> shuffles;  // two for each warp
  Meeting barriers[2];
  unsigned current = 0;
  int64_t progress = 0;
  jmp_buf scheduler;
  std::string error;
};

inline Block* block = nullptr;

inline char* stack_of(unsigned thread) {
  static std::vector<char*> stacks;
  while (stacks.size() <= thread) {
    void* memory = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for a stack");
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[thread];
}

// The calling thread's own code goes on: what it uses is watched.
MINIFT_UNWATCHED inline void watch_current() {
  const Thread& me = block->threads[block->current];
  watch.now = {block->number, static_cast<uint32_t>(me.barriers), static_cast<uint32_t>(me.shuffles),
               static_cast<uint16_t>(block->current), Use::NONE};
  watch.stack = stack_of(block->current);
  watch.stack_end = watch.stack + STACK_BYTES;
  watch.is_on = true;
}

MINIFT_UNWATCHED inline void run_thread() {
  Thread& me = block->threads[block->current];
  try {
    watch_current();
    block->kernel();
  } catch (const std::exception& error) {
    block->error = error.what();
  }
  watch.is_on = false;
  me.done = true;
  ++block->progress;
  _longjmp(block->scheduler, 1);
}

// Runs a thread until it gives way or ends.
MINIFT_UNWATCHED inline void resume(unsigned index) {
  Thread& thread = block->threads[index];
  block->current = index;
  threadIdx = dim3(index, 0, 0);
  if (_setjmp(block->scheduler) != 0) return;
  if (thread.started) _longjmp(thread.context, 1);
  thread.started = true;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = stack_of(index);
  thread.start.uc_stack.ss_size = STACK_BYTES;
  thread.start.uc_link = nullptr;
  makecontext(&thread.start, run_thread, 0);
  setcontext(&thread.start);
}

// The calling thread goes on when `expected` threads have arrived where it is.
MINIFT_UNWATCHED inline Meeting& meet(Meeting (&two)[2], int64_t& count, unsigned expected, const uint64_t* shows) {
  watch.is_on = false;
  Thread& me = block->threads[block->current];
  unsigned lane = block->current % WARP;
  int64_t number = count++;
  Meeting& here = two[number % 2];
  here.arrive(number);
  if (shows != nullptr) here.shown[lane] = *shows;
  ++block->progress;
  while (here.number == number && here.arrived < expected) {
    if (_setjmp(me.context) == 0) _longjmp(block->scheduler, 1);
  }
  watch_current();
  return here;
}

MINIFT_UNWATCHED inline void run_block(const std::function<void()>& kernel, uint32_t number, unsigned num_threads,
                                       std::mt19937& random) {
  Block mine;
  mine.kernel = kernel;
  mine.number = number;
  mine.threads.resize(num_threads);
  mine.shuffles.resize(2 * ((num_threads + WARP - 1) / WARP));
  block = &mine;
  std::vector<unsigned> order(num_threads);
  for (unsigned i = 0; i < num_threads; ++i) order[i] = i;
  for (unsigned i = num_threads; i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  // Some warps do nothing until the others get no further: so these run ahead of them as far as nothing stops them.
  uint64_t idle = random();
  for (bool running = true; running && mine.error.empty();) {
    int64_t before = mine.progress;
    running = false;
    for (unsigned i = 0; i < num_threads && mine.error.empty(); ++i) {
      Thread& thread = mine.threads[order[i]];
      if (!thread.done && (idle >> (order[i] / WARP) & 1) == 0) resume(order[i]);
      running |= !thread.done;
    }
    bool got_further = mine.progress != before;
    if (idle == 0 && got_further) {
      idle = random();
      continue;
    }
    if (idle != 0 && !got_further) idle = 0;  // for one round
    else if (running && !got_further) {
      mine.error = "threads wait at a barrier or in a shuffle for others that have ended or wait elsewhere";
    }
  }
  block = nullptr;
  if (!mine.error.empty()) fail(mine.error);
}

// `bits` to the other lanes of the warp, all of theirs from there: until the next meeting but one.
MINIFT_UNWATCHED inline const uint64_t* shown_by_all(uint64_t bits) {
  watch.is_on = false;
  auto& two = reinterpret_cast<Meeting(&)[2]>(block->shuffles[block->current / WARP * 2]);
  return meet(two, block->threads[block->current].shuffles, WARP, &bits).shown;
}

// Those of one of them.
MINIFT_UNWATCHED inline uint64_t show(uint64_t bits, unsigned from_lane) {
  return shown_by_all(bits)[from_lane % WARP];
}

template <class T>
T shuffle(unsigned mask, T value, unsigned from_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) fail("a shuffle names a part of the warp");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = show(bits, from_lane);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned lane() { return threadIdx.x % WARP; }

// Ends the calling thread, from where nothing can be thrown.
[[noreturn]] MINIFT_UNWATCHED inline void fail_in_thread(const char* what) {
  if (block == nullptr) std::abort();
  watch.is_on = false;
  block->error = what;
  ++block->progress;
  _longjmp(block->scheduler, 1);
}

// As long as it lives, an access to memory that does not exist is a thread's error.
class OnlyExistingMemory {
 public:
  OnlyExistingMemory() {
    struct sigaction action {};
    action.sa_handler = [](int) { fail_in_thread("an access beyond a tensor"); };
    action.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &action, &previous_);
  }
  ~OnlyExistingMemory() { sigaction(SIGSEGV, &previous_, nullptr); }

 private:
  struct sigaction previous_;
};

}  // namespace cuda_on_cpu

// What the compiler's sanitizer calls, here for -fsanitize=alignment,bounds -fno-sanitize-recover.
extern "C" {
__attribute__((weak)) void __ubsan_handle_type_mismatch_v1_abort(void*, uintptr_t) {
  cuda_on_cpu::fail_in_thread("a misaligned access");
}
__attribute__((weak)) void __ubsan_handle_out_of_bounds_abort(void*, uintptr_t) {
  cuda_on_cpu::fail_in_thread("an index beyond an array");
}
}

// ---- on the device ----

MINIFT_UNWATCHED inline void __syncthreads() {
  using namespace cuda_on_cpu;
  watch.is_on = false;
  meet(block->barriers, block->threads[block->current].barriers, block->threads.size(), nullptr);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::shuffle(mask, 0, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return cuda_on_cpu::shuffle(mask, value, from);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::lane() ^ with);
}

template <class T>
T min(T a, T b) { return b < a ? b : a; }
template <class T>
T max(T a, T b) { return a < b ? b : a; }

inline float __uint_as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t __float_as_uint(float value) { return __builtin_bit_cast(uint32_t, value); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fdiv_rn(float a, float b) { return a / b; }

// ---- on the host ----

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess = 0 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 2, cudaSuccess; }
inline int aoti_torch_get_current_cuda_stream(int, void** stream) { return *stream = nullptr, 0; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_on_cpu;
  static std::mt19937 random(0);
  if (config->blockDim.x > 1024 || config->blockDim.x % WARP) fail("threads are no multiple of a warp up to 1024");
  if (config->gridDim.y > 65535 || config->gridDim.z > 65535) fail("a grid has at most 65535 in y and z");
  OnlyExistingMemory only_existing_memory;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  watch.begin_launch(&__bss_start, &_end);
  uint32_t number = 0;
  for (unsigned z = 0; z < gridDim.z; ++z) {
    for (unsigned y = 0; y < gridDim.y; ++y) {
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block([&] { kernel(arguments...); }, number++, blockDim.x, random);
      }
    }
  }
  return cudaSuccess;
}
