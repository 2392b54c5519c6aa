// Detection of the processor's instruction set, and two ops for tests and benchmarks: `instruction_set()` names the
// set in use and `use_instruction_set(name)` changes it for the whole process ("best" goes back to the detected one).

#include "instruction_set.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <string>

namespace minift {
namespace {

constexpr const char* NAMES[] = {"portable", "avx2", "avx512", "avx512_bf16"};

InstructionSet best_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return InstructionSet::portable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return InstructionSet::avx2;
  }
  return __builtin_cpu_supports("avx512bf16") ? InstructionSet::avx512_bf16 : InstructionSet::avx512;
#else
  return InstructionSet::portable;
#endif
}

std::atomic<InstructionSet>& current() {
  static std::atomic<InstructionSet> value{best_instruction_set()};
  return value;
}

std::string instruction_set_name() {
  return NAMES[static_cast<int>(instruction_set())];
}

void use_instruction_set(std::string name) {
  if (name == "best") {
    current() = best_instruction_set();
    return;
  }
  for (int i = 0; i <= static_cast<int>(best_instruction_set()); ++i) {
    if (name == NAMES[i]) {
      current() = static_cast<InstructionSet>(i);
      return;
    }
  }
  STD_TORCH_CHECK(false, "instruction set '", name, "' is unknown or not offered by this processor, whose best is '",
                  NAMES[static_cast<int>(best_instruction_set())], "'");
}

}  // namespace

InstructionSet instruction_set() {
  return current().load(std::memory_order_relaxed);
}

STABLE_TORCH_LIBRARY_IMPL(minift, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set_name));
  m.impl("use_instruction_set", TORCH_BOX(&use_instruction_set));
}

}  // namespace minift
