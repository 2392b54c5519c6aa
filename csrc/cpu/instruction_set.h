// Which of the compiled instruction sets the CPU kernels use; chosen once when the library loads, from what the
// processor and the operating system offer.

#pragma once

namespace minift {

enum class InstructionSet : int { portable, avx2, avx512, avx512_bf16 };

InstructionSet instruction_set();

}  // namespace minift

// Pointer to the kernel of this name for the instruction set in use. See for_each_instruction_set.h.
#if defined(__x86_64__)
#define MINIFT_KERNEL(...)                                                                            \
  (::minift::instruction_set() == ::minift::InstructionSet::avx512_bf16 ? &avx512_bf16::__VA_ARGS__    \
   : ::minift::instruction_set() == ::minift::InstructionSet::avx512    ? &avx512::__VA_ARGS__         \
   : ::minift::instruction_set() == ::minift::InstructionSet::avx2      ? &avx2::__VA_ARGS__           \
                                                                        : &portable::__VA_ARGS__)
#else
#define MINIFT_KERNEL(...) (&portable::__VA_ARGS__)
#endif
