// Includes the file named by MINIFT_KERNELS once per instruction set, each time inside a namespace of that name:
//
//     #define MINIFT_KERNELS "swiglu_kernels.h"
//     #include "for_each_instruction_set.h"
//     auto* kernel = MINIFT_KERNEL(swiglu<float>);      // portable::swiglu<float>, avx2::..., as the processor offers
//
// So one source gives one binary that runs on every processor. The kernels are written with the compiler's vector
// types (vector.h), whose width LANES (fp32 elements) is set here. The target is set by pragma and not by per-file
// flags because a file compiled with, say, -mavx512f may hand its copies of inline library functions to the linker,
// which then run on processors without AVX-512. For the same reason a kernel file includes nothing but other kernel
// files and calls nothing but compiler builtins.

#ifndef MINIFT_KERNELS
#error "define MINIFT_KERNELS as the kernel file to include"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define MINIFT_TARGET_BEGIN(target_string) \
  _Pragma(MINIFT_STRING(clang attribute push(__attribute__((target(target_string))), apply_to = function)))
#define MINIFT_TARGET_END _Pragma("clang attribute pop")
#else
#define MINIFT_TARGET_BEGIN(target_string) \
  _Pragma("GCC push_options") _Pragma(MINIFT_STRING(GCC target(target_string)))
#define MINIFT_TARGET_END _Pragma("GCC pop_options")
#endif
#define MINIFT_STRING(...) #__VA_ARGS__

#define LANES 4
#define HAS_BF16 0
namespace minift::portable {
#include "vector.h"
#include MINIFT_KERNELS
}  // namespace minift::portable
#undef LANES

#if defined(__x86_64__)

#define LANES 8
MINIFT_TARGET_BEGIN("avx2,fma,f16c")
namespace minift::avx2 {
#include "vector.h"
#include MINIFT_KERNELS
}  // namespace minift::avx2
MINIFT_TARGET_END
#undef LANES

#define LANES 16
MINIFT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace minift::avx512 {
#include "vector.h"
#include MINIFT_KERNELS
}  // namespace minift::avx512
MINIFT_TARGET_END

#undef HAS_BF16
#define HAS_BF16 1
MINIFT_TARGET_BEGIN("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace minift::avx512_bf16 {
#include "vector.h"
#include MINIFT_KERNELS
}  // namespace minift::avx512_bf16
MINIFT_TARGET_END
#undef LANES

#endif

#undef HAS_BF16
