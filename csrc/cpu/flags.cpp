// Signals between processes on one host: 64-bit counters in memory that all of them have mapped.
//
// A writer's stores before set_flag are visible to whoever saw its new value in wait_flags (release and acquire), on
// processors with weaker ordering than x86 too. Waiting spins for some microseconds, then gives its core away: on a
// machine with fewer cores than processes the awaited one may need it.

#include <sched.h>
#include <time.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace minift {
namespace {

using torch::stable::Tensor;

int64_t* counters(const Tensor& flags) {
  STD_TORCH_CHECK(
      flags.scalar_type() == torch::headeronly::ScalarType::Long && flags.dim() == 1 && flags.stride(0) == 1,
      "flags must be contiguous 1-D int64");
  return static_cast<int64_t*>(flags.data_ptr());
}

void set_flag(const Tensor& flags, int64_t index, int64_t value) {
  int64_t* counter = counters(flags);
  STD_TORCH_CHECK(index >= 0 && index < flags.size(0), "set_flag: index out of range");
  __atomic_store_n(counter + index, value, __ATOMIC_RELEASE);
}

// True when every counter is at least `value`; false after `timeout_ms`.
bool wait_flags(const Tensor& flags, int64_t value, int64_t timeout_ms) {
  constexpr int64_t SPINS = 2000, YIELDS = 200, CHECK_CLOCK_EVERY = 64;
  int64_t* counter = counters(flags);
  int64_t count = flags.size(0), index = 0;
  timespec start{}, now{};
  clock_gettime(CLOCK_MONOTONIC, &start);
  for (int64_t turn = 0; index < count; ++turn) {
    if (__atomic_load_n(counter + index, __ATOMIC_ACQUIRE) >= value) {
      ++index;
      continue;
    }
    if (turn < SPINS) {
      // Look again at once: signals between busy ranks are a few microseconds apart.
    } else if (turn < SPINS + YIELDS) {
      sched_yield();
    } else {
      timespec nap{0, 20000};
      nanosleep(&nap, nullptr);
    }
    if (turn >= SPINS && turn % CHECK_CLOCK_EVERY == 0) {
      clock_gettime(CLOCK_MONOTONIC, &now);
      if ((now.tv_sec - start.tv_sec) * 1000 + (now.tv_nsec - start.tv_nsec) / 1000000 > timeout_ms) return false;
    }
  }
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minift, CPU, m) {
  m.impl("set_flag", TORCH_BOX(&set_flag));
  m.impl("wait_flags", TORCH_BOX(&wait_flags));
}

}  // namespace minift
