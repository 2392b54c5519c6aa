"""Builds minift's one extension, `minift._C`; everything else is in pyproject.toml.

CPU kernels are always built, CUDA kernels when this torch has CUDA and nvcc is found; USE_CUDA=0 or USE_CUDA=1 in the
environment decides otherwise. They are for the card that is there, else for A100, H100 and later ones;
TORCH_CUDA_ARCH_LIST names others (bf16 on the tensor cores needs 8.0). The extension must be compiled against the torch
it will run with, hence:

    pip install -c constraints.txt --no-build-isolation -e .      # or: python setup.py build_ext --inplace
"""

import os
import shutil
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11, and every later one
CXX_FLAGS = ["-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", STABLE_ABI]
# Vectors as arguments of inlined functions have no ABI to worry about; GCC 12 misreads its own AVX-512 headers.
CXX_FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized"]

cpp_sources = ["csrc/registration.cpp", *map(str, sorted(Path("csrc/cpu").glob("*.cpp")))]
cuda_sources = [str(path) for path in sorted(Path("csrc/cuda").glob("*.c*"))]  # .cu: kernels, .cpp: their ops
has_cuda = torch.version.cuda is not None and CUDA_HOME is not None
use_cuda = bool(cuda_sources) and os.environ.get("USE_CUDA", str(int(has_cuda))) == "1"
if use_cuda and not torch.cuda.is_available():  # torch would ask the card that is not there
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")

Extension = CUDAExtension if use_cuda else CppExtension
extension = Extension(
    "minift._C",
    sources=cpp_sources + (cuda_sources if use_cuda else []),
    extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", STABLE_ABI]},
    define_macros=[("USE_CUDA", None)] if use_cuda else [],
    depends=[str(path) for path in sorted(Path("csrc").rglob("*.h"))],
    py_limited_api=True,
)


class Build(BuildExtension):
    def build_extensions(self):
        if shutil.which(get_cxx_compiler()) is None:
            raise SystemExit(
                f"minift needs a C++ compiler to build its extension, and '{get_cxx_compiler()}' was not found. "
                "Install one (Debian, Ubuntu: apt-get install g++) or name it in the environment variable CXX."
            )
        super().build_extensions()


setup(
    ext_modules=[extension],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
