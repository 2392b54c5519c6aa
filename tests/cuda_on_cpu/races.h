// Finds threads that use one address without an order between them, one of them writing. For cuda_runtime.h.
//
// The kernels are compiled with -fsanitize=thread, whose calls at every access to memory come to the functions at the
// end of this file instead of the sanitizer's own. Every byte remembers who wrote it and who read it last in this
// launch, and when: between which barriers of the block, and which meetings of the warp. Two threads of a block are in
// order if there was a barrier in between, those of a warp also after a shuffle; blocks are never. So a race is found
// whichever thread happened to run first, in shared memory as in tensors. Not here: atomics, which no kernel uses.

#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#define MINIFT_UNWATCHED __attribute__((no_sanitize("thread")))

namespace cuda_on_cpu {

// When and by whom a byte was used. others: who else reads it at that time, with nothing that puts them in order: a
// writer must come after all of them.
struct Use {
  enum Others : uint8_t { NONE, OF_WARP, OF_BLOCK, OF_GRID };

  uint32_t block, barriers, meetings;
  uint16_t thread;
  Others others;
};

struct ByteUses {
  uintptr_t address;
  uint32_t launch;
  bool is_written, is_read;
  Use write, read;
};

struct Watch {
  static constexpr uintptr_t MOST_BYTES = 1 << 22;  // that are told apart; of others the latest are remembered

  bool is_on = false;  // while a kernel's own code runs
  uint32_t launch = 0;
  Use now{};  // who is running
  const char *stack = nullptr, *stack_end = nullptr, *shared = nullptr, *shared_end = nullptr;
  ByteUses* bytes = nullptr;

  MINIFT_UNWATCHED void begin_launch(const char* first_shared, const char* last_shared) {
    if (bytes == nullptr) {
      void* memory = mmap(nullptr, MOST_BYTES * sizeof(ByteUses), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) __builtin_trap();
      bytes = static_cast<ByteUses*>(memory);
    }
    shared = first_shared, shared_end = last_shared;
    ++launch;
  }
};

inline Watch watch;

MINIFT_UNWATCHED inline bool is_of_warp(const Use& a, const Use& b) { return a.thread / 32 == b.thread / 32; }

// Whether what is running now comes after `earlier`, whatever the order in which threads run. Blocks that follow each
// other in shared memory are no matter: it is another's.
MINIFT_UNWATCHED inline bool is_after(const Use& earlier, bool in_shared) {
  const Use& now = watch.now;
  if (earlier.block != now.block) return in_shared;
  if (earlier.others == Use::OF_GRID) return false;
  if (earlier.barriers != now.barriers) return true;
  if (earlier.others == Use::OF_BLOCK) return false;
  if (earlier.others == Use::NONE && earlier.thread == now.thread) return true;
  return is_of_warp(earlier, now) && earlier.meetings != now.meetings;
}

// An earlier reader and the running one as one use.
MINIFT_UNWATCHED inline Use both(const Use& earlier, bool in_shared) {
  Use use = watch.now;
  if (is_after(earlier, in_shared)) return use;
  use.others = earlier.block != use.block ? Use::OF_GRID : is_of_warp(earlier, use) ? Use::OF_WARP : Use::OF_BLOCK;
  if (use.others < earlier.others) use.others = earlier.others;
  return use;
}

[[noreturn]] void fail_in_thread(const char* what);

MINIFT_UNWATCHED inline void use(const void* memory, size_t size, bool writes) {
  if (!watch.is_on) return;
  const char* first = static_cast<const char*>(memory);
  if (first >= watch.stack && first < watch.stack_end) return;
  bool in_shared = first >= watch.shared && first < watch.shared_end;
  for (size_t i = 0; i < size; ++i) {
    uintptr_t address = reinterpret_cast<uintptr_t>(first) + i;
    ByteUses& byte = watch.bytes[address % Watch::MOST_BYTES];
    if (byte.address != address || byte.launch != watch.launch) byte = {address, watch.launch, false, false, {}, {}};
    bool ordered = !byte.is_written || is_after(byte.write, in_shared);
    if (writes) ordered &= !byte.is_read || is_after(byte.read, in_shared);
    if (!ordered) {
      watch.is_on = false;
      fail_in_thread(in_shared ? "a race in shared memory"
                               : "a race: nothing puts threads in order that use one address");
    }
    if (writes) {
      byte.is_written = true, byte.is_read = false;
      byte.write = watch.now;
    } else {
      byte.read = byte.is_read ? both(byte.read, in_shared) : watch.now;
      byte.is_read = true;
    }
  }
}

}  // namespace cuda_on_cpu

#define MINIFT_USE(NAME, SIZE, WRITES)                                                       \
  extern "C" __attribute__((weak)) MINIFT_UNWATCHED void __tsan_##NAME##SIZE(void* memory) { \
    cuda_on_cpu::use(memory, SIZE, WRITES);                                                  \
  }
#define MINIFT_USES(SIZE)                 \
  MINIFT_USE(read, SIZE, false)           \
  MINIFT_USE(write, SIZE, true)           \
  MINIFT_USE(unaligned_read, SIZE, false) \
  MINIFT_USE(unaligned_write, SIZE, true)
MINIFT_USES(1)
MINIFT_USES(2)
MINIFT_USES(4)
MINIFT_USES(8)
MINIFT_USES(16)

extern "C" {
__attribute__((weak)) MINIFT_UNWATCHED void __tsan_read_range(void* memory, size_t size) {
  cuda_on_cpu::use(memory, size, false);
}
__attribute__((weak)) MINIFT_UNWATCHED void __tsan_write_range(void* memory, size_t size) {
  cuda_on_cpu::use(memory, size, true);
}
__attribute__((weak)) MINIFT_UNWATCHED void __tsan_init() {}
__attribute__((weak)) MINIFT_UNWATCHED void __tsan_vptr_update(void**, void*) {}
__attribute__((weak)) MINIFT_UNWATCHED void __tsan_func_entry(void*) {}
__attribute__((weak)) MINIFT_UNWATCHED void __tsan_func_exit() {}

// Counts of references, on the host.
__attribute__((weak)) MINIFT_UNWATCHED int __tsan_atomic32_fetch_add(volatile int* at, int value, int order) {
  return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
}
__attribute__((weak)) MINIFT_UNWATCHED signed char __tsan_atomic8_load(const volatile signed char* at, int order) {
  return __atomic_load_n(at, __ATOMIC_SEQ_CST);
}
}
