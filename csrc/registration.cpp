// Schemas of every minift op, and the empty Python module whose import loads them.
//
// Only torch's stable ABI is used (torch/csrc/stable, feature level 2.11), and Python's limited API, so one binary
// serves every torch >= 2.11 and every Python >= 3.11. Kernels register themselves beside their code
// (cpu/<op>.cpp, cuda/<op>.cu); the plain-PyTorch default of each op is registered in minift/ops/<family>.py.

#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(minift, m) {
  // minift/ops/norm.py. rstd is fp32 with x's leading shape; dweight is fp32 and has no elements unless needed.
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, Tensor? dresidual, bool need_dweight)"
      " -> (Tensor dx, Tensor dweight)");

  // minift/ops/swiglu.py. In place, dy becomes dgate; y, what forward gave, has no elements unless needed.
  m.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)");
  m.def("swiglu_backward_(Tensor(a!) dy, Tensor gate, Tensor up, bool need_y) -> (Tensor dup, Tensor y)");

  // minift/ops/updated_swiglu.py. counts: how many of the terms belong to gate, to up and, in backward, to dy.
  m.def("updated_swiglu(Tensor gate, Tensor up, Tensor[] narrows, Tensor[] factors, int[] counts) -> Tensor");
  m.def(
      "updated_swiglu_backward_(Tensor(a!) dy, Tensor gate, Tensor up, Tensor[] narrows, Tensor[] factors,"
      " int[] counts, bool need_y) -> (Tensor dup, Tensor y)");

  // minift/ops/cross_entropy.py. targets int64; losses are fp32, of each row.
  m.def("cross_entropy_(Tensor(a!) logits, Tensor targets, bool need_gradient) -> Tensor losses");

  // minift/ops/low_rank.py. Wide matrices are one for each factor, or one for all; a bias without elements is none.
  m.def("to_rank(Tensor[] wides, Tensor[] factors, float[] scales) -> Tensor");
  m.def("from_rank(Tensor[] narrows, Tensor[] factors, int[] counts, Tensor[] biases) -> Tensor[]");
  m.def("factor_gradients_(Tensor(a!)[] gradients, Tensor[] wides, Tensor[] narrows) -> ()");
  m.def(
      "to_rank_and_gradients_(Tensor[] wides, Tensor[] factors, float[] scales, Tensor[] narrows,"
      " Tensor(a!)[] gradients) -> Tensor");

  // minift/ops/rope.py. inverse rotates by minus the angle, which is the backward of the rotation.
  m.def("rope(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor");

  // minift/ops/attention.py. Bounds are int32; lse (T, H) is fp32. Backward takes what forward returned.
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor q_bounds, Tensor kv_bounds, int? window)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor q_bounds,"
      " Tensor kv_bounds, int? window) -> (Tensor dq, Tensor dk, Tensor dv)");

  // minift/ops/adamw.py. All 1-D; lower: the other half of fp32 weights whose upper half is `master`, or none;
  // grad_factor: one fp32, or none. key and first: of the random bits of a bf16 master.
  m.def(
      "adamw(Tensor(a!) master, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? lower,"
      " Tensor? grad_factor, float beta1, float beta2, float eps, float step_size, float keep, int key, int first)"
      " -> ()");

  // minift/ops/adamw_8bit.py. As above, with moments as codes and one absmax for every 256 elements.
  m.def(
      "adamw_8bit(Tensor(a!) master, Tensor grad, Tensor(b!) exp_avg_codes, Tensor(c!) exp_avg_absmax,"
      " Tensor(d!) exp_avg_sq_codes, Tensor(e!) exp_avg_sq_absmax, Tensor signed_values, Tensor signed_buckets,"
      " Tensor unsigned_values, Tensor unsigned_buckets, Tensor(f!)? lower, Tensor? grad_factor, float beta1,"
      " float beta2, float eps, float step_size, float keep, int key, int first) -> ()");

  // minift/ops/nf4.py. scales are fp32 per block; or uint8, with nested_absmax, offset and nested_map.
  m.def("nf4_tables() -> (Tensor codebook, Tensor thresholds)");
  m.def("nf4_absmax(Tensor weight, int block_size) -> Tensor");
  m.def("nf4_quantize(Tensor weight, int block_size) -> (Tensor codes, Tensor absmax)");
  m.def(
      "nf4_dequantize(Tensor(a!) out, Tensor codes, Tensor scales, Tensor? nested_absmax, Tensor? offset,"
      " Tensor? nested_map, int block_size, int start, int stride) -> ()");

  // minift/ops/nf4_shift.py: columns (size, blocks), candidates (candidates, blocks).
  m.def("nf4_shifts(Tensor columns, Tensor candidates, Tensor lacks) -> Tensor");

  // minift/ops/nf4_linear.py
  m.def(
      "nf4_gemv(Tensor x, Tensor codes, Tensor scales, Tensor? nested_absmax, Tensor? offset, Tensor? nested_map,"
      " int block_size) -> Tensor");

  // minift/ops/sgmv.py. ranks (adapters, 2), bounds (segments + 1,) and choice (segments,) are int32, on the CPU.
  m.def("sgmv_(Tensor(a!) y, Tensor x, Tensor A, Tensor B, Tensor ranks, Tensor bounds, Tensor choice) -> ()");

  // minift/ops/dropout.py. The mask is a function of seed and element index alone.
  m.def("dropout(Tensor x, int seed, int num_dropped) -> Tensor");

  // minift/ops/flags.py
  m.def("set_flag(Tensor(a!) flags, int index, int value) -> ()");
  m.def("wait_flags(Tensor flags, int value, int timeout_ms) -> bool");

  // cpu/instruction_set.cpp
  m.def("instruction_set() -> str");
  m.def("use_instruction_set(str name) -> ()");
}

static PyModuleDef module_definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};

PyMODINIT_FUNC PyInit__C(void) {
  return PyModule_Create(&module_definition);
}
