// Between torch tensors and launchers: the stream to launch on, and the key under which ops are registered.

#pragma once

#include "../tensors.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>
#include <torch/headeronly/util/shim_utils.h>

// Tests register the same ops for the CPU, where they run the same kernels thread by thread.
#if !defined(MINIFT_CUDA_KEY)
#define MINIFT_CUDA_KEY CUDA
#endif

namespace minift::cuda {

// The device of `tensor` is the current one as long as this lives; `stream` is torch's current stream there.
class OnDevice {
 public:
  // The others, or those that are given of them, must be on the same device: a kernel would read the host's memory.
  template <class... Others>
  explicit OnDevice(const Tensor& tensor, const Others&... others) {
    STD_TORCH_CHECK((is_on(tensor.get_device(), others) && ...), "all tensors of an op must be on one device");
    check(cudaGetDevice(&previous_));
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &current));
    stream = static_cast<cudaStream_t>(current);
    check(cudaSetDevice(tensor.get_device()));  // the last thing that can fail: who fails earlier has changed nothing
  }
  ~OnDevice() { cudaSetDevice(previous_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaStream_t stream;

 private:
  static bool is_on(int device, const Tensor& tensor) { return tensor.get_device() == device; }
  static bool is_on(int device, const std::optional<Tensor>& tensor) { return !tensor || is_on(device, *tensor); }
  static bool is_on(int device, const std::vector<Tensor>& tensors) {
    return std::all_of(tensors.begin(), tensors.end(), [&](const Tensor& tensor) { return is_on(device, tensor); });
  }
  static void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error)); }

  int previous_ = 0;
};

}  // namespace minift::cuda
