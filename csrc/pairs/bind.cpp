// The pair losses on the CPU, for Python; pairs.h has the shapes.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/bind.h"
#include "pairs.h"

namespace py = pybind11;
using namespace lift_fast;

namespace {

Element row_type(int type) {
  if (type < 0 || type > 3) throw std::invalid_argument("an element type is 0 (f32), 1 (bf16), 2 (f16) or 3 (int8)");
  return static_cast<Element>(type);
}

Rows rows_of(Address data, int type, int64_t count, int64_t stride, Address scales) {
  return {at<const void>(data), row_type(type), count, stride, at<const float>(scales)};
}

Pairs pairs_of(const Rows& x, const Rows& t, int64_t dim, float scale, float bias, int64_t offset) {
  return {x, t, dim, scale, bias, offset};
}

Gradient gradient_of(bool of_text, float factor, Address out, int out_type, Address kept, int64_t kept_stride) {
  return {of_text, factor, at<void>(out), row_type(out_type), at<const float>(kept), kept_stride};
}

}  // namespace

void bind_pairs(py::module_& module) {
  using namespace py::literals;
  py::class_<Rows>(module, "Rows").def(py::init(&rows_of), "data"_a, "type"_a, "count"_a, "stride"_a, "scales"_a);
  py::class_<Pairs>(module, "Pairs")
      .def(py::init(&pairs_of), "x"_a, "t"_a, "dim"_a, "scale"_a, "bias"_a, "offset"_a);
  py::class_<Gradient>(module, "Gradient")
      .def(py::init(&gradient_of), "of_text"_a, "factor"_a, "out"_a, "out_type"_a, "kept"_a, "kept_stride"_a);
  module.def("pairs_isa_levels", &isa_names, "Instruction sets of this CPU for the losses over pairs, slowest first.");
  module.def("pairs_stats", [](const Pairs& pairs, Address row, int64_t row_stride, Address col, int64_t col_stride,
                               Address own, Address keep, int64_t keep_stride, int threads, const std::string& isa) {
    const Stats stats{at<float>(row), at<float>(col), row_stride, col_stride,
                      at<float>(own), at<float>(keep), keep_stride};
    const Isa chosen = isa_named(isa);
    py::gil_scoped_release release;
    stats_cpu(pairs, stats, threads, chosen);
  }, "pairs"_a, "row"_a, "row_stride"_a, "col"_a, "col_stride"_a, "own"_a, "keep"_a, "keep_stride"_a, "threads"_a,
     "isa"_a = "");
  module.def("pairs_softmax_gradient", [](const Pairs& pairs, const Gradient& gradient, Address row_max,
                                          Address row_sum, Address col_max, Address col_sum, float row_weight,
                                          float col_weight, Address own, int threads, const std::string& isa) {
    const Softmax softmax{at<const float>(row_max), at<const float>(row_sum), at<const float>(col_max),
                          at<const float>(col_sum), row_weight, col_weight, at<const float>(own)};
    const Isa chosen = isa_named(isa);
    py::gil_scoped_release release;
    softmax_gradient_cpu(pairs, softmax, gradient, threads, chosen);
  }, "pairs"_a, "gradient"_a, "row_max"_a, "row_sum"_a, "col_max"_a, "col_sum"_a, "row_weight"_a,
     "col_weight"_a, "own"_a, "threads"_a, "isa"_a = "");
  module.def("pairs_sigmoid", [](const Pairs& pairs, const Gradient& gradient, float alpha, Address loss,
                                 Address d_scale, Address d_bias, Address keep, int64_t keep_stride, int threads,
                                 const std::string& isa) {
    const Sigmoid sigmoid{alpha, at<float>(loss), at<float>(d_scale), at<float>(d_bias)};
    const Isa chosen = isa_named(isa);
    py::gil_scoped_release release;
    sigmoid_cpu(pairs, sigmoid, gradient, at<float>(keep), keep_stride, threads, chosen);
  }, "pairs"_a, "gradient"_a, "alpha"_a, "loss"_a, "d_scale"_a, "d_bias"_a, "keep"_a, "keep_stride"_a, "threads"_a,
     "isa"_a = "");
}
