// Marks functions that run on the processor and, when nvcc compiles them, also on the GPU.

#pragma once

#if defined(__CUDACC__)
#define MINIFT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MINIFT_HOST_DEVICE __attribute__((always_inline)) inline
#endif
