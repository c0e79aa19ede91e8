// What a transformer block does between its matrix products, on the GPU, for Python; blocks_cuda.h has the shapes.
#include <pybind11/pybind11.h>

#include "build_info.h"  // written by setup.py: LIFT_FAST_CUDA
#include "common/bind.h"
#if LIFT_FAST_CUDA
#include "blocks_cuda.h"
#endif

namespace py = pybind11;

#if LIFT_FAST_CUDA
namespace lift_fast {
namespace {

int64_t layernorm_parts(int64_t rows, int64_t width, int type, int multiprocessors) {
  return gpu::layernorm_parts(rows, width, float_type(type), multiprocessors);
}

int64_t bias_act_parts(int64_t rows, int64_t width, int type, int multiprocessors) {
  return gpu::bias_act_parts(rows, width, float_type(type), multiprocessors);
}

void layernorm(Address x, Address residual, Address weight, Address bias, float eps, Address y, Address s, Address mean,
               Address rstd, int64_t rows, int64_t width, int type, int device, Address stream) {
  const gpu::LayerNorm job{at<const void>(x), at<const void>(residual), at<const float>(weight), at<const float>(bias),
                           eps, at<void>(y), at<void>(s), at<float>(mean), at<float>(rstd), rows, width,
                           float_type(type)};
  run_on_gpu("layernorm", [&] { return gpu::layernorm(job, device, stream); });
}

void layernorm_backward(Address dy, Address s, Address mean, Address rstd, Address weight, Address bias, Address d_s,
                        Address dx, Address y, Address d_weight, Address d_bias, Address scratch, int64_t parts,
                        int64_t rows, int64_t width, int type, int device, Address stream) {
  const gpu::LayerNormBackward job{at<const void>(dy), at<const void>(s), at<const float>(mean), at<const float>(rstd),
                                   at<const float>(weight), at<const float>(bias), at<const void>(d_s), at<void>(dx),
                                   at<void>(y), at<float>(d_weight), at<float>(d_bias), at<float>(scratch), parts, rows,
                                   width, float_type(type)};
  run_on_gpu("the gradient of layernorm", [&] { return gpu::layernorm_backward(job, device, stream); });
}

void bias_act(Address h, Address bias, Address a, int64_t rows, int64_t width, int multiprocessors, int activation,
              int type, int device, Address stream) {
  const gpu::BiasAct job{at<const void>(h), at<const float>(bias), at<void>(a), rows, width, multiprocessors,
                         activation_of(activation), float_type(type)};
  run_on_gpu("bias and activation", [&] { return gpu::bias_act(job, device, stream); });
}

void bias_act_backward(Address da, Address h, Address bias, Address dh, Address a, Address d_bias, Address scratch,
                       int64_t parts, int64_t rows, int64_t width, int activation, int type, int device,
                       Address stream) {
  const gpu::BiasActBackward job{at<const void>(da), at<const void>(h), at<const float>(bias), at<void>(dh),
                                 at<void>(a), at<float>(d_bias), at<float>(scratch), parts, rows, width,
                                 activation_of(activation), float_type(type)};
  run_on_gpu("the gradient of bias and activation", [&] { return gpu::bias_act_backward(job, device, stream); });
}

}  // namespace
}  // namespace lift_fast
#endif

void bind_transformer_cuda(py::module_& module) {
#if LIFT_FAST_CUDA
  using namespace lift_fast;
  using namespace py::literals;
  module.def("layernorm_parts", &layernorm_parts, "rows"_a, "width"_a, "type"_a, "multiprocessors"_a);
  module.def("bias_act_parts", &bias_act_parts, "rows"_a, "width"_a, "type"_a, "multiprocessors"_a);
  module.def("layernorm_cuda", &layernorm, "x"_a, "residual"_a, "weight"_a, "bias"_a, "eps"_a, "y"_a,
             "s"_a, "mean"_a, "rstd"_a, "rows"_a, "width"_a, "type"_a, "device"_a, "stream"_a);
  module.def("layernorm_backward_cuda", &layernorm_backward, "dy"_a, "s"_a, "mean"_a, "rstd"_a,
             "weight"_a, "bias"_a, "d_s"_a, "dx"_a, "y"_a, "d_weight"_a, "d_bias"_a,
             "scratch"_a, "parts"_a, "rows"_a, "width"_a, "type"_a, "device"_a, "stream"_a);
  module.def("bias_act_cuda", &bias_act, "h"_a, "bias"_a, "a"_a, "rows"_a, "width"_a,
             "multiprocessors"_a, "activation"_a, "type"_a, "device"_a, "stream"_a);
  module.def("bias_act_backward_cuda", &bias_act_backward, "da"_a, "h"_a, "bias"_a, "dh"_a, "a"_a,
             "d_bias"_a, "scratch"_a, "parts"_a, "rows"_a, "width"_a, "activation"_a, "type"_a,
             "device"_a, "stream"_a);
#else
  (void)module;
#endif
}
