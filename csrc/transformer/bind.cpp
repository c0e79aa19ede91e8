// csrc/transformer/blocks.h for Python; see there for shapes. Addresses are integers, 0 for null.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/bind.h"
#include "blocks.h"

namespace py = pybind11;
using namespace lift_fast;

namespace {

Element element(int type) {
  if (type < 0 || type > 2) throw std::invalid_argument("a token's type is 0 (f32), 1 (bf16) or 2 (f16)");
  return static_cast<Element>(type);
}

Activation activation_of(int activation) {
  if (activation < 0 || activation > 2)
    throw std::invalid_argument("an activation is 0 (gelu), 1 (gelu_tanh) or 2 (quick_gelu)");
  return static_cast<Activation>(activation);
}

}  // namespace

void bind_blocks(py::module_& module) {
  using namespace py::literals;
  module.def("blocks_isa_levels", [] {
    py::list levels;
    for (int i = 0; i <= static_cast<int>(best_pairs_isa()); ++i) levels.append(kIsaNames[i]);
    return levels;
  }, "Instruction sets of this CPU for layernorm and mlp, slowest first.");
  module.def("layernorm_cpu", [](Address x, Address residual, Address weight, Address bias, float eps, Address y,
                                 Address stream, Address mean, Address rstd, int64_t rows, int64_t width, int type,
                                 int threads, const std::string& isa) {
    const LayerNorm job{element(type), rows, width, at<const void>(x), at<const void>(residual),
                        at<const float>(weight), at<const float>(bias), eps, at<void>(y), at<void>(stream),
                        at<float>(mean), at<float>(rstd)};
    const PairsIsa chosen = isa_named(isa);
    py::gil_scoped_release release;
    layernorm_cpu(job, threads, chosen);
  }, "x"_a, "residual"_a, "weight"_a, "bias"_a, "eps"_a, "y"_a, "stream"_a, "mean"_a, "rstd"_a, "rows"_a, "width"_a,
     "type"_a, "threads"_a, "isa"_a = "");
  module.def("layernorm_backward_cpu", [](Address dy, Address stream, Address mean, Address rstd, Address weight,
                                          Address bias, Address d_stream, Address dx, Address y, Address d_weight,
                                          Address d_bias, int64_t rows, int64_t width, int type, int threads,
                                          const std::string& isa) {
    const LayerNormBackward job{element(type), rows, width, at<const void>(dy), at<const void>(stream),
                                at<const void>(d_stream), at<const float>(mean), at<const float>(rstd),
                                at<const float>(weight), at<const float>(bias), at<void>(dx), at<void>(y),
                                at<float>(d_weight), at<float>(d_bias)};
    const PairsIsa chosen = isa_named(isa);
    py::gil_scoped_release release;
    layernorm_backward_cpu(job, threads, chosen);
  }, "dy"_a, "stream"_a, "mean"_a, "rstd"_a, "weight"_a, "bias"_a, "d_stream"_a, "dx"_a, "y"_a, "d_weight"_a,
     "d_bias"_a, "rows"_a, "width"_a, "type"_a, "threads"_a, "isa"_a = "");
  module.def("bias_act_cpu", [](Address h, Address bias, Address a, int64_t rows, int64_t width, int activation,
                                int type, int threads, const std::string& isa) {
    const BiasAct job{element(type), activation_of(activation), rows, width, at<const void>(h), at<const float>(bias),
                      at<void>(a)};
    const PairsIsa chosen = isa_named(isa);
    py::gil_scoped_release release;
    bias_act_cpu(job, threads, chosen);
  }, "h"_a, "bias"_a, "a"_a, "rows"_a, "width"_a, "activation"_a, "type"_a, "threads"_a, "isa"_a = "");
  module.def("bias_act_backward_cpu", [](Address da, Address h, Address bias, Address dh, Address a, Address d_bias,
                                         int64_t rows, int64_t width, int activation, int type, int threads,
                                         const std::string& isa) {
    const BiasActBackward job{element(type), activation_of(activation), rows, width, at<const void>(da),
                              at<const void>(h), at<const float>(bias), at<void>(dh), at<void>(a), at<float>(d_bias)};
    const PairsIsa chosen = isa_named(isa);
    py::gil_scoped_release release;
    bias_act_backward_cpu(job, threads, chosen);
  }, "da"_a, "h"_a, "bias"_a, "dh"_a, "a"_a, "d_bias"_a, "rows"_a, "width"_a, "activation"_a, "type"_a, "threads"_a,
     "isa"_a = "");
}
