// Attention on the CPU, for Python; attention.h has the shapes.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "attention.h"
#include "common/bind.h"

namespace py = pybind11;
using namespace lift_fast;

namespace {

Attention attention_of(Address qkv, int type, int64_t batch, int64_t tokens, int64_t heads, int64_t dim, float scale,
                       bool causal) {
  if (dim < 1) throw std::invalid_argument("head_dim must be at least 1");
  return {at<const void>(qkv), float_type(type), batch, tokens, heads, dim, scale, causal};
}

}  // namespace

void bind_attention(py::module_& module) {
  using namespace py::literals;
  py::class_<Attention>(module, "Attention")
      .def(py::init(&attention_of), "qkv"_a, "type"_a, "batch"_a, "tokens"_a, "heads"_a, "dim"_a, "scale"_a,
           "causal"_a);
  module.def("attention_forward", [](const Attention& attention, Address out, Address lse, int threads,
                                     const std::string& isa) {
    const Isa chosen = isa_named(isa);
    py::gil_scoped_release release;
    attention_forward_cpu(attention, at<void>(out), at<float>(lse), threads, chosen);
  }, "attention"_a, "out"_a, "lse"_a, "threads"_a, "isa"_a = "");
  module.def("attention_backward", [](const Attention& attention, Address d_out, Address lse, Address d_qkv,
                                      Address out, int threads, const std::string& isa) {
    const Isa chosen = isa_named(isa);
    py::gil_scoped_release release;
    attention_backward_cpu(attention, at<const void>(d_out), at<const float>(lse), at<void>(d_qkv), at<void>(out),
                           threads, chosen);
  }, "attention"_a, "d_out"_a, "lse"_a, "d_qkv"_a, "out"_a, "threads"_a, "isa"_a = "");
}
