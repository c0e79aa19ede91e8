// What a transformer block does between its matrix products, on the GPU, for Python; addresses are integers.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "build_info.h"  // written by setup.py: LIFT_FAST_CUDA
#if LIFT_FAST_CUDA
#include "blocks_cuda.h"
#endif

namespace py = pybind11;

#if LIFT_FAST_CUDA
namespace lift_fast {
namespace {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Out out_type(int type) {
  if (type < 0 || type > 2) throw std::invalid_argument("type must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  return static_cast<Out>(type);
}

gpu::Activation activation_of(int activation) {
  if (activation < 0 || activation > 2)
    throw std::invalid_argument("activation must be 0 (gelu), 1 (gelu_tanh) or 2 (quick_gelu)");
  return static_cast<gpu::Activation>(activation);
}

template <typename Launch>
void run(const char* what, Launch launch) {
  const char* error = nullptr;
  {
    py::gil_scoped_release release;
    error = launch();
  }
  if (error) throw std::runtime_error(std::string(what) + " on the GPU: " + error);
}

int64_t layernorm_parts(int64_t rows, int64_t width, int type, int multiprocessors) {
  return gpu::layernorm_parts(rows, width, out_type(type), multiprocessors);
}

int64_t bias_act_parts(int64_t rows, int64_t width, int type, int multiprocessors) {
  return gpu::bias_act_parts(rows, width, out_type(type), multiprocessors);
}

void layernorm(Address x, Address residual, Address weight, Address bias, float eps, Address y, Address s, Address mean,
               Address rstd, int64_t rows, int64_t width, int type, int device, Address stream) {
  const gpu::LayerNorm job{at<const void>(x), at<const void>(residual), at<const float>(weight), at<const float>(bias),
                           eps, at<void>(y), at<void>(s), at<float>(mean), at<float>(rstd), rows, width,
                           out_type(type)};
  run("layernorm", [&] { return gpu::layernorm(job, device, stream); });
}

void layernorm_backward(Address dy, Address s, Address mean, Address rstd, Address weight, Address bias, Address d_s,
                        Address dx, Address y, Address d_weight, Address d_bias, Address scratch, int64_t parts,
                        int64_t rows, int64_t width, int type, int device, Address stream) {
  const gpu::LayerNormBackward job{at<const void>(dy), at<const void>(s), at<const float>(mean), at<const float>(rstd),
                                   at<const float>(weight), at<const float>(bias), at<const void>(d_s), at<void>(dx),
                                   at<void>(y), at<float>(d_weight), at<float>(d_bias), at<float>(scratch), parts, rows,
                                   width, out_type(type)};
  run("the gradient of layernorm", [&] { return gpu::layernorm_backward(job, device, stream); });
}

void bias_act(Address h, Address bias, Address a, int64_t rows, int64_t width, int multiprocessors, int activation,
              int type, int device, Address stream) {
  const gpu::BiasAct job{at<const void>(h), at<const float>(bias), at<void>(a), rows, width, multiprocessors,
                         activation_of(activation), out_type(type)};
  run("bias and activation", [&] { return gpu::bias_act(job, device, stream); });
}

void bias_act_backward(Address da, Address h, Address bias, Address dh, Address a, Address d_bias, Address scratch,
                       int64_t parts, int64_t rows, int64_t width, int activation, int type, int device,
                       Address stream) {
  const gpu::BiasActBackward job{at<const void>(da), at<const void>(h), at<const float>(bias), at<void>(dh),
                                 at<void>(a), at<float>(d_bias), at<float>(scratch), parts, rows, width,
                                 activation_of(activation), out_type(type)};
  run("the gradient of bias and activation", [&] { return gpu::bias_act_backward(job, device, stream); });
}

}  // namespace
}  // namespace lift_fast
#endif

void bind_blocks_cuda(py::module_& module) {
#if LIFT_FAST_CUDA
  using namespace lift_fast;
  using py::arg;
  module.def("layernorm_parts", &layernorm_parts, arg("rows"), arg("width"), arg("type"), arg("multiprocessors"));
  module.def("bias_act_parts", &bias_act_parts, arg("rows"), arg("width"), arg("type"), arg("multiprocessors"));
  module.def("layernorm_cuda", &layernorm, arg("x"), arg("residual"), arg("weight"), arg("bias"), arg("eps"), arg("y"),
             arg("s"), arg("mean"), arg("rstd"), arg("rows"), arg("width"), arg("type"), arg("device"), arg("stream"));
  module.def("layernorm_backward_cuda", &layernorm_backward, arg("dy"), arg("s"), arg("mean"), arg("rstd"),
             arg("weight"), arg("bias"), arg("d_s"), arg("dx"), arg("y"), arg("d_weight"), arg("d_bias"),
             arg("scratch"), arg("parts"), arg("rows"), arg("width"), arg("type"), arg("device"), arg("stream"));
  module.def("bias_act_cuda", &bias_act, arg("h"), arg("bias"), arg("a"), arg("rows"), arg("width"),
             arg("multiprocessors"), arg("activation"), arg("type"), arg("device"), arg("stream"));
  module.def("bias_act_backward_cuda", &bias_act_backward, arg("da"), arg("h"), arg("bias"), arg("dh"), arg("a"),
             arg("d_bias"), arg("scratch"), arg("parts"), arg("rows"), arg("width"), arg("activation"), arg("type"),
             arg("device"), arg("stream"));
#else
  (void)module;
#endif
}
