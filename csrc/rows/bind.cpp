// Gathering rows on the CPU, and keys, for Python; dequant.h and table.h have the shapes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "common/bind.h"
#include "dequant.h"
#include "mapping.h"
#include "table.h"

namespace py = pybind11;
using namespace lift_fast;

namespace {

Codec codec_numbered(int codec) {
  if (codec < 0 || codec > 5) throw std::invalid_argument("codec must be 0 to 5 (Codec of csrc/rows/codec.h)");
  return static_cast<Codec>(codec);
}

Element out_type(int type, Codec codec, bool normalize) {
  if (type < 0 || type > 4)
    throw std::invalid_argument("type must be 0 (float32), 1 (bfloat16), 2 (float16), 3 (int8) or 4 (codes)");
  const auto out = static_cast<Element>(type);
  if (out == Element::int8 && !is_integer(codec))
    throw std::invalid_argument("type 3 (int8) takes a codec of integers");
  if (normalize && (out == Element::int8 || out == Element::codes))
    throw std::invalid_argument("normalize takes a type of floats");
  return out;
}

void check_address(const char* what, Address address, int64_t count) {
  if (count < 0) throw std::invalid_argument("a count is negative: " + std::to_string(count));
  if (count > 0 && !address) throw std::invalid_argument(std::string(what) + " is null");
}

constexpr int64_t kMostColumns = int64_t{1} << 40;

void check_dim(int64_t dim, int64_t least) {
  if (dim < least || dim > kMostColumns) throw std::invalid_argument("dim is " + std::to_string(dim));
}

void dequant_on_cpu(Address codes, Address scales, Address rows, Address out, int64_t n, int64_t m, int64_t dim,
                    int64_t codes_stride, int64_t scales_stride, int codec, int type, bool normalize, int threads,
                    const std::string& isa) {
  const Codec kind = codec_numbered(codec);
  const Dequant job{at<const void>(codes), at<const float>(scales), at<const int64_t>(rows), at<void>(out), n, m, dim,
                    codes_stride, scales_stride, kind, out_type(type, kind, normalize), normalize};
  const Isa chosen = isa_named(isa);
  check_dim(dim, 0);
  check_address("codes", codes, n > 0 && dim > 0 ? m : 0);
  check_address("out", out, dim > 0 ? m : 0);
  if (n < 0 || m < 0 || (!rows && m > n))
    throw std::invalid_argument(std::to_string(m) + " rows of a table of " + std::to_string(n));
  py::gil_scoped_release release;
  dequant_cpu(job, threads, chosen);
}

Starts starts_of(const py::buffer& buffer) {
  const py::buffer_info info = buffer.request();
  const char kind = info.format.empty() ? ' ' : info.format.back();
  if (info.ndim != 1 || info.itemsize != 8 || (kind != 'l' && kind != 'q') ||
      (info.shape[0] > 1 && info.strides[0] != 8))
    throw std::invalid_argument("starts must be contiguous int64 [shards + 1]");
  const auto* data = static_cast<const int64_t*>(info.ptr);
  std::vector<int64_t> starts(info.shape[0]);
  for (size_t k = 0; k < starts.size(); ++k) starts[k] = load<int64_t>(data + k);
  return Starts(std::move(starts));
}

template <typename T>
void check_shard(const T& table, int64_t shard) {
  if (shard < 0 || shard >= table.starts().shards())
    throw py::index_error("shard " + std::to_string(shard) + " of a table of " +
                          std::to_string(table.starts().shards()) + " shards");
}

// read and write run `call` without Python's lock: reads at the same time as each other, a write alone.
template <typename T, typename Read>
auto read(T& table, const Read& call) {
  std::shared_mutex& mutex = table.lock().get();
  py::gil_scoped_release release;
  const std::shared_lock<std::shared_mutex> lock(mutex);
  return call();
}

template <typename T, typename Write>
void write(T& table, const Write& call) {
  std::shared_mutex& mutex = table.lock().get();
  py::gil_scoped_release release;
  const std::unique_lock<std::shared_mutex> lock(mutex);
  call();
}

void bind_table(py::module_& module) {
  using namespace py::literals;
  py::class_<Table>(module, "Table")
      .def(py::init([](int codec, int64_t dim, const py::buffer& starts) {
             check_dim(dim, 1);
             return std::make_unique<Table>(codec_numbered(codec), dim, starts_of(starts));
           }),
           "codec"_a, "dim"_a, "starts"_a)
      .def("map",
           [](Table& table, int64_t shard, Address codes, Address scales) {
             check_shard(table, shard);
             if (!codes && scales) throw std::invalid_argument("scales without codes");
             write(table, [&] { table.map(shard, at<const void>(codes), at<const void>(scales)); });
           },
           "shard"_a, "codes"_a, "scales"_a)
      .def("unmapped",
           [](Table& table, Address rows, int64_t m) {
             check_address("rows", 1, m);
             return read(table, [&] { return table.unmapped(at<const int64_t>(rows), m); });
           },
           "rows"_a, "m"_a)
      .def("gather",
           [](Table& table, Address rows, int64_t m, Address out, Address out_scales, int type, bool normalize,
              int threads, const std::string& isa) {
             const Element kind = out_type(type, table.codec(), normalize);
             const Isa chosen = isa_named(isa);
             check_address("out", out, m);
             read(table, [&] {
               table.gather(at<const int64_t>(rows), m, at<void>(out), at<float>(out_scales), kind, normalize, threads,
                            chosen);
             });
           },
           "rows"_a, "m"_a, "out"_a, "out_scales"_a, "type"_a, "normalize"_a, "threads"_a, "isa"_a = "")
      .def("advise",
           [](Table& table, Address rows, int64_t m) {
             check_address("rows", 1, m);
             read(table, [&] { table.advise(at<const int64_t>(rows), m); });
           },
           "rows"_a, "m"_a)
      .def("touched", [](Table& table) { return read(table, [&] { return table.touched(); }); });
}

std::unique_ptr<Mapping> mapped(int file, int64_t bytes) {
  if (bytes < 1) throw std::invalid_argument("a mapping has at least 1 byte, not " + std::to_string(bytes));
  try {
    return std::make_unique<Mapping>(file, bytes);
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
  }
}

void bind_mapping(py::module_& module) {
  using namespace py::literals;
  py::class_<Mapping>(module, "Mapping", py::buffer_protocol())
      .def(py::init(&mapped), "file"_a, "bytes"_a)
      .def_property_readonly("lost", &Mapping::lost)
      .def_buffer([](Mapping& mapping) {
        return py::buffer_info(mapping.data(), 1, py::format_descriptor<uint8_t>::format(), 1, {mapping.bytes()}, {1});
      });
  module.def("lost_mappings", &lost_mappings);
  module.def("handle_bus_errors", &handle_bus_errors);
}

void hash_keys(const py::list& keys, Address out) {
  check_address("out", out, static_cast<int64_t>(keys.size()));
  auto* to = at<uint8_t>(out);
  for (const py::handle key : keys) {
    if (!PyUnicode_Check(key.ptr()))
      throw py::type_error("a key is a str, not " + std::string(py::str(py::type::of(key))));
    int64_t hash;
    if (PyUnicode_IS_COMPACT_ASCII(key.ptr())) {
      hash = key_hash(PyUnicode_DATA(key.ptr()), PyUnicode_GET_LENGTH(key.ptr()));
    } else {  // PyUnicode_AsUTF8 would keep the bytes for as long as the str
      const auto bytes = py::reinterpret_steal<py::object>(PyUnicode_AsUTF8String(key.ptr()));
      if (!bytes) throw py::error_already_set();
      hash = key_hash(PyBytes_AS_STRING(bytes.ptr()), PyBytes_GET_SIZE(bytes.ptr()));
    }
    std::memcpy(to, &hash, sizeof hash);
    to += sizeof hash;
  }
}

void bind_keys(py::module_& module) {
  using namespace py::literals;
  module.def("key_hashes", &hash_keys, "keys"_a, "out"_a);
  py::class_<KeyTable>(module, "KeyTable")
      .def(py::init([](const py::buffer& starts) { return std::make_unique<KeyTable>(starts_of(starts)); }), "starts"_a)
      .def("map",
           [](KeyTable& table, int64_t shard, Address keys) {
             check_shard(table, shard);
             write(table, [&] { table.map(shard, at<const void>(keys)); });
           },
           "shard"_a, "keys"_a)
      .def("build", [](KeyTable& table) { write(table, [&] { table.build(); }); })
      .def("find",
           [](KeyTable& table, Address hashes, int64_t m, Address out) {
             check_address("hashes", hashes, m);
             check_address("out", out, m);
             while (true) {
               const bool found = read(table, [&] {
                 if (table.built()) table.find(at<const int64_t>(hashes), m, at<int64_t>(out));
                 return table.built();
               });
               if (found) return;
               write(table, [&] { table.build(); });
             }
           },
           "hashes"_a, "m"_a, "out"_a)
      .def_property_readonly("bytes", [](KeyTable& table) { return read(table, [&] { return table.bytes(); }); });
}

}  // namespace

void bind_rows(py::module_& module) {
  using namespace py::literals;
  module.def("isa_levels", &isa_names, "Instruction sets this CPU has, slowest first.");
  module.def("dequant_cpu", &dequant_on_cpu, "codes"_a, "scales"_a, "rows"_a, "out"_a, "n"_a, "m"_a, "dim"_a,
             "codes_stride"_a, "scales_stride"_a, "codec"_a, "type"_a, "normalize"_a, "threads"_a, "isa"_a = "");
  bind_table(module);
  bind_mapping(module);
  bind_keys(module);
}
