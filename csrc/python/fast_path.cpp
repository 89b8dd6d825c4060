// Meta-gradient of a repeated call on other values: checks that nothing else has changed and runs
// the op. In C++, because for a small network the checks in Python take half as long as the work.
#include "python/fast_path.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <optional>
#include <string_view>
#include <vector>

#include "task_program/parameter_arena.h"

namespace fastmeta {
namespace {

namespace py = pybind11;
using at::Tensor;

// Properties of a plain dense tensor, except its values.
class Kind {
 public:
  explicit Kind(const Tensor& x)
      : sizes_(x.sizes().vec()),
        dtype_(x.scalar_type()),
        device_(x.device()),
        requires_grad_(x.requires_grad()) {}

  bool is_of(PyObject* object) const {
    return THPVariable_CheckExact(object) && is_of(THPVariable_Unpack(object));
  }
  bool is_of_with_gradient(PyObject* object) const {
    return is_of(object) && THPVariable_Unpack(object).requires_grad() == requires_grad_;
  }

 private:
  bool is_of(const Tensor& x) const {
    return x.layout() == at::kStrided && x.scalar_type() == dtype_ && x.device() == device_ &&
           x.sizes() == at::IntArrayRef(sizes_);
  }

  std::vector<int64_t> sizes_;
  at::ScalarType dtype_;
  at::Device device_;
  bool requires_grad_;
};

std::vector<Kind> kinds(const std::vector<Tensor>& tensors) {
  return {tensors.begin(), tensors.end()};
}

// Whether a dictionary still has the same objects: (dictionary, its keys, its values).
bool is_unchanged(const py::tuple& table) {
  PyObject* dict = PyTuple_GET_ITEM(table.ptr(), 0);
  PyObject* keys = PyTuple_GET_ITEM(table.ptr(), 1);
  PyObject* values = PyTuple_GET_ITEM(table.ptr(), 2);
  if (PyDict_Size(dict) != PyTuple_GET_SIZE(keys)) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (Py_ssize_t i = 0; PyDict_Next(dict, &position, &key, &value); ++i) {
    if (key != PyTuple_GET_ITEM(keys, i) || value != PyTuple_GET_ITEM(values, i)) return false;
  }
  return true;
}

// Whether no transform, mode or trace would see the op, and none would change its result.
bool is_plain_eager(at::DeviceType device) {
  const auto extra = c10::impl::tls_local_dispatch_key_set().included_ - c10::default_included_set;
  return extra.empty() && !at::impl::torch_function_mode_enabled() &&
         !at::autocast::is_autocast_enabled(device);
}

bool torch_backend_is_asked_for() {
  const char* backend = std::getenv("FASTMETA_BACKEND");  // os.environ writes here
  return backend != nullptr && *backend != 0 && std::string_view(backend) != "native";
}

// support_x, support_y, query_x, query_y.
using Data = std::array<PyObject*, 4>;

class CachedStep {
 public:
  CachedStep(Tensor code, Tensor lr, const std::vector<Tensor>& parameters,
             const std::vector<Tensor>& frozen, const std::vector<Tensor>& data,
             std::vector<int64_t> output_shape, int64_t steps, bool first_order, bool keep)
      : code_(std::move(code)),
        lr_(std::move(lr)),
        parameters_(kinds(parameters)),
        frozen_(kinds(frozen)),
        data_(kinds(data)),
        no_frozen_(at::empty({0}, lr_.options())),
        output_shape_(std::move(output_shape)),
        steps_(steps),
        first_order_(first_order),
        keep_(keep) {}

  // Whether only values have changed.
  bool holds(const py::tuple& tables, const py::tuple& parameters, const py::tuple& frozen,
             const Data& data) const {
    if (!is_plain_eager(lr_.device().type()) || torch_backend_is_asked_for() || !fits(data) ||
        !fit(parameters_, parameters) || !fit(frozen_, frozen)) {
      return false;
    }
    return std::all_of(tables.begin(), tables.end(), [](py::handle table) {
      return is_unchanged(py::reinterpret_borrow<py::tuple>(table));
    });
  }

  py::object operator()(const py::tuple& tables, const py::tuple& parameters,
                        const py::tuple& frozen, const Data& data) const {
    if (!holds(tables, parameters, frozen, data)) return py::none();
    return run(unpacked(parameters), unpacked(frozen), data);
  }

  // Returns (loss, outputs); autograd knows the gradient of the loss.
  py::object meta_loss(const py::tuple& tables, const py::tuple& parameters,
                       const py::tuple& frozen, const Data& data) const {
    if (!holds(tables, parameters, frozen, data)) return py::none();
    const auto inputs = tensors_of(data);
    Tensor loss, outputs;
    {
      const auto own = unpacked(parameters), others = unpacked(frozen);
      const py::gil_scoped_release no_gil;
      std::tie(loss, outputs) =
          meta_loss_op().call(code_, own, others.empty() ? no_frozen_ : joined(others), lr_,
                              inputs[0], inputs[1], inputs[2], inputs[3], at::ArrayRef<double>(),
                              steps_, first_order_, keep_, std::nullopt, std::nullopt);
      if (output_shape_.size() != 1) outputs = outputs.view(shape_of(outputs));
    }
    return py::make_tuple(std::move(loss), std::move(outputs));
  }

 private:
  static std::array<Tensor, 4> tensors_of(const Data& data) {
    return {THPVariable_Unpack(data[0]), THPVariable_Unpack(data[1]), THPVariable_Unpack(data[2]),
            THPVariable_Unpack(data[3])};
  }

  bool fits(const Data& data) const {
    for (size_t i = 0; i < data.size(); ++i) {
      if (!data_[i].is_of(data[i])) return false;
      const bool target = i % 2 == 1;
      if (target && at::GradMode::is_enabled() && THPVariable_Unpack(data[i]).requires_grad()) {
        return false;
      }
    }
    return true;
  }

  static bool fit(const std::vector<Kind>& kinds, const py::tuple& tensors) {
    for (size_t i = 0; i < kinds.size(); ++i) {
      if (!kinds[i].is_of_with_gradient(PyTuple_GET_ITEM(tensors.ptr(), i))) return false;
    }
    return true;
  }

  static std::vector<Tensor> unpacked(const py::tuple& tensors) {
    std::vector<Tensor> out;
    out.reserve(tensors.size());
    for (const auto& tensor : tensors) out.push_back(THPVariable_Unpack(tensor.ptr()));
    return out;
  }

  // Returns (loss, outputs, gradient [P]).
  py::tuple run(const std::vector<Tensor>& parameters, const std::vector<Tensor>& frozen,
                const Data& data) const {
    const auto inputs = tensors_of(data);
    Tensor loss, outputs, grads;
    {
      const py::gil_scoped_release no_gil;
      const at::AutoDispatchBelowAutograd below;
      std::tie(loss, outputs, grads, std::ignore, std::ignore, std::ignore) =
          meta_gradient_op().call(
              code_, joined(parameters), frozen.empty() ? no_frozen_ : joined(frozen), lr_,
              inputs[0], inputs[1], inputs[2], inputs[3], at::ArrayRef<double>(), steps_,
              first_order_, keep_, true, false, false, false, std::nullopt, std::nullopt);
      if (output_shape_.size() != 1) outputs = outputs.view(shape_of(outputs));
    }
    return py::make_tuple(std::move(loss), std::move(outputs), std::move(grads));
  }

  // The module's shape of outputs [T, Q, n].
  std::vector<int64_t> shape_of(const Tensor& outputs) const {
    std::vector<int64_t> shape{outputs.size(0), outputs.size(1)};
    shape.insert(shape.end(), output_shape_.begin(), output_shape_.end());
    return shape;
  }

  Tensor code_, lr_;
  std::vector<Kind> parameters_, frozen_, data_;
  Tensor no_frozen_;
  std::vector<int64_t> output_shape_;
  int64_t steps_;
  bool first_order_, keep_;
};

}  // namespace

// A method of CachedStep for Python: (tables, parameters, frozen, the four tensors of a batch).
template <auto method>
auto bound() {
  return [](const CachedStep& step, const py::tuple& tables, const py::tuple& parameters,
            const py::tuple& frozen, const py::object& support_x, const py::object& support_y,
            const py::object& query_x, const py::object& query_y) {
    const Data data{support_x.ptr(), support_y.ptr(), query_x.ptr(), query_y.ptr()};
    const auto taken = [&]() -> py::object {
      HANDLE_TH_ERRORS  // as torch.ops reports errors
          return (step.*method)(tables, parameters, frozen, data);
      END_HANDLE_TH_ERRORS_RET({})
    }();
    if (!taken) throw py::error_already_set();
    return taken;
  };
}

void bind_prepared_step(py::module_& m) {
  py::class_<CachedStep>(m, "CachedStep", "A meta-gradient, to be taken again on other values.")
      .def(py::init<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>,
                    std::vector<int64_t>, int64_t, bool, bool>())
      .def("__call__", bound<&CachedStep::operator()>(),
           "(loss, outputs, gradient), or None where something else has changed.")
      .def("meta_loss", bound<&CachedStep::meta_loss>(),
           "(loss, outputs) with a graph, or None where something else has changed.")
      .def(
          "holds",
          [](const CachedStep& step, const py::tuple& tables, const py::tuple& parameters,
             const py::tuple& frozen, const py::object& support_x, const py::object& support_y,
             const py::object& query_x, const py::object& query_y) {
            const Data data{support_x.ptr(), support_y.ptr(), query_x.ptr(), query_y.ptr()};
            return step.holds(tables, parameters, frozen, data);
          },
          "Whether nothing but values has changed.");
}

}  // namespace fastmeta
