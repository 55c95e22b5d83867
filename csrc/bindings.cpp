// The operators of the library as torch sees them, `torch.ops.megads.*`: checks, memory, stream. Kernels are in *.cu.
//
// Only torch's stable ABI is used, so that one build serves torch 2.11 and later, every Python, and also loads where
// torch has no CUDA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <string>
#include <tuple>

#include "include/norm.cuh"

// Absent from a torch without CUDA: weak, so that the library loads there too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace megads {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Float float_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Float::f32;
    case ScalarType::Half:
      return Float::f16;
    case ScalarType::BFloat16:
      return Float::bf16;
    default:
      STD_TORCH_CHECK(false, "rms_norm: x must be float32, float16 or bfloat16");
  }
}

void check(const Tensor& tensor, const char* name, const Tensor& like, int64_t numel) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), "rms_norm: ", name,
                  " must be on x's GPU");
  STD_TORCH_CHECK(tensor.is_contiguous(), "rms_norm: ", name, " must be contiguous");
  STD_TORCH_CHECK(tensor.numel() == numel, "rms_norm: ", name, " must have ", numel, " elements, has ",
                  tensor.numel());
}

void check_type(const Tensor& tensor, const char* name, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, "rms_norm: ", name, " has another dtype than expected");
}

void check_launch(cudaError_t error, NormShape shape) {
  STD_TORCH_CHECK(error == cudaSuccess, "rms_norm of ", shape.rows, " x ", shape.hidden, ": ",
                  cudaGetErrorString(error));
}

NormShape shape_of(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) > 0, "rms_norm: x must be [..., hidden], hidden > 0");
  const int64_t hidden = x.size(x.dim() - 1);
  const NormShape shape{x.numel() / hidden, hidden};
  check(x, "x", x, x.numel());
  check(weight, "weight", x, hidden);
  check_type(weight, "weight", x.scalar_type());
  return shape;
}

cudaStream_t stream_of(const Tensor& x) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

std::tuple<Tensor, Tensor> rms_norm_forward_op(const Tensor& x, const Tensor& weight, double eps) {
  const NormShape shape = shape_of(x, weight);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor y = torch::stable::empty_like(x);
  const std::array<int64_t, 1> rows{shape.rows};
  Tensor rstd = torch::stable::new_empty(x, rows, ScalarType::Float);
  check_launch(rms_norm_forward(float_type(x), shape, x.data_ptr(), weight.data_ptr(), static_cast<float>(eps),
                                y.data_ptr(), static_cast<float*>(rstd.data_ptr()), stream_of(x)),
               shape);
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward_op(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                const Tensor& rstd) {
  const NormShape shape = shape_of(x, weight);
  check(dy, "dy", x, x.numel());
  check_type(dy, "dy", x.scalar_type());
  check(rstd, "rstd", x, shape.rows);
  check_type(rstd, "rstd", ScalarType::Float);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor dx = torch::stable::empty_like(x), dweight = torch::stable::empty_like(weight);
  int num_partials = 0;
  check_launch(rms_norm_max_partials(&num_partials), shape);
  const std::array<int64_t, 2> sizes{num_partials, shape.hidden};
  Tensor partials = torch::stable::new_empty(x, sizes, ScalarType::Float);
  check_launch(rms_norm_backward(float_type(x), shape, dy.data_ptr(), x.data_ptr(), weight.data_ptr(),
                                 static_cast<const float*>(rstd.data_ptr()), dx.data_ptr(), dweight.data_ptr(),
                                 static_cast<float*>(partials.data_ptr()), stream_of(x)),
               shape);
  return {dx, dweight};
}

}  // namespace
}  // namespace megads

STABLE_TORCH_LIBRARY(megads, m) {
  m.def("rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dweight)");
}

STABLE_TORCH_LIBRARY_IMPL(megads, CUDA, m) {
  m.impl("rms_norm_forward", TORCH_BOX(&megads::rms_norm_forward_op));
  m.impl("rms_norm_backward", TORCH_BOX(&megads::rms_norm_backward_op));
}
