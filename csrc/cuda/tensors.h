// Between torch tensors and launchers: the stream to launch on, and the key under which ops are registered.

#pragma once

#include "../tensors.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/shim_utils.h>

// Tests register the same ops for the CPU, where they run the same kernels thread by thread.
#if !defined(MINIFT_CUDA_KEY)
#define MINIFT_CUDA_KEY CUDA
#endif

namespace minift::cuda {

// The device of `tensor` is the current one as long as this lives; `stream` is torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) {
    check(cudaGetDevice(&previous_));
    check(cudaSetDevice(tensor.get_device()));
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  ~OnDevice() { cudaSetDevice(previous_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaStream_t stream;

 private:
  static void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error)); }

  int previous_ = 0;
};

}  // namespace minift::cuda
