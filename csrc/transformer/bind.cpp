// The parts of a transformer block on the CPU, for Python; blocks.h has the shapes.
#include <pybind11/pybind11.h>

#include <string>

#include "blocks.h"
#include "common/bind.h"

namespace py = pybind11;
using namespace lift_fast;

void bind_transformer(py::module_& module) {
  using namespace py::literals;
  module.def("blocks_isa_levels", &isa_names, "Instruction sets of this CPU for layernorm and mlp, slowest first.");
  module.def("layernorm_cpu", [](Address x, Address residual, Address weight, Address bias, float eps, Address y,
                                 Address stream, Address mean, Address rstd, int64_t rows, int64_t width, int type,
                                 int threads, const std::string& isa) {
    const LayerNorm job{float_type(type), rows, width, at<const void>(x), at<const void>(residual),
                        at<const float>(weight), at<const float>(bias), eps, at<void>(y), at<void>(stream),
                        at<float>(mean), at<float>(rstd)};
    const Isa chosen = isa_named(isa);
    py::gil_scoped_release release;
    layernorm_cpu(job, threads, chosen);
  }, "x"_a, "residual"_a, "weight"_a, "bias"_a, "eps"_a, "y"_a, "stream"_a, "mean"_a, "rstd"_a, "rows"_a, "width"_a,
     "type"_a, "threads"_a, "isa"_a = "");
  module.def("layernorm_backward_cpu", [](Address dy, Address stream, Address mean, Address rstd, Address weight,
                                          Address bias, Address d_stream, Address dx, Address y, Address d_weight,
                                          Address d_bias, int64_t rows, int64_t width, int type, int threads,
                                          const std::string& isa) {
    const LayerNormBackward job{float_type(type), rows, width, at<const void>(dy), at<const void>(stream),
                                at<const void>(d_stream), at<const float>(mean), at<const float>(rstd),
                                at<const float>(weight), at<const float>(bias), at<void>(dx), at<void>(y),
                                at<float>(d_weight), at<float>(d_bias)};
    const Isa chosen = isa_named(isa);
    py::gil_scoped_release release;
    layernorm_backward_cpu(job, threads, chosen);
  }, "dy"_a, "stream"_a, "mean"_a, "rstd"_a, "weight"_a, "bias"_a, "d_stream"_a, "dx"_a, "y"_a, "d_weight"_a,
     "d_bias"_a, "rows"_a, "width"_a, "type"_a, "threads"_a, "isa"_a = "");
  module.def("bias_act_cpu", [](Address h, Address bias, Address a, int64_t rows, int64_t width, int activation,
                                int type, int threads, const std::string& isa) {
    const BiasAct job{float_type(type), activation_of(activation), rows, width, at<const void>(h),
                      at<const float>(bias), at<void>(a)};
    const Isa chosen = isa_named(isa);
    py::gil_scoped_release release;
    bias_act_cpu(job, threads, chosen);
  }, "h"_a, "bias"_a, "a"_a, "rows"_a, "width"_a, "activation"_a, "type"_a, "threads"_a, "isa"_a = "");
  module.def("bias_act_backward_cpu", [](Address da, Address h, Address bias, Address dh, Address a, Address d_bias,
                                         int64_t rows, int64_t width, int activation, int type, int threads,
                                         const std::string& isa) {
    const BiasActBackward job{float_type(type), activation_of(activation), rows, width, at<const void>(da),
                              at<const void>(h), at<const float>(bias), at<void>(dh), at<void>(a), at<float>(d_bias)};
    const Isa chosen = isa_named(isa);
    py::gil_scoped_release release;
    bias_act_backward_cpu(job, threads, chosen);
  }, "da"_a, "h"_a, "bias"_a, "dh"_a, "a"_a, "d_bias"_a, "rows"_a, "width"_a, "activation"_a, "type"_a, "threads"_a,
     "isa"_a = "");
}
