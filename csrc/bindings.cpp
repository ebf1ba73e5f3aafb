// The Python module spotspeed._native; only the files called bindings* know Python.
//
// Every binding checks sizes and addresses before memory is touched, and releases the GIL while
// bytes move. What a job borrows is kept alive by the `keep` object that its handle holds.
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arena.h"
#include "bindings_unlocked.h"
#include "device.h"
#include "device_plan.h"
#include "host_copy.h"
#include "planes.h"

namespace py = pybind11;
using namespace spotspeed;

void bind_control(py::module_& module);
void bind_cut(py::module_& module);

namespace {

using CopyTuple = std::tuple<std::uintptr_t, std::uintptr_t, std::size_t>;
using PackTuple = std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>;

std::vector<Copy> to_copies(const std::vector<CopyTuple>& tuples) {
  std::vector<Copy> copies;
  copies.reserve(tuples.size());
  for (const auto& [source, target, size] : tuples) {
    copies.push_back({reinterpret_cast<const std::byte*>(source),
                      reinterpret_cast<std::byte*>(target), size});
  }
  return copies;
}

// Rows of (source, target, bytes) in a contiguous buffer of unsigned 64-bit integers: no Python
// object for each copy.
std::vector<Copy> read_copies(const py::buffer& buffer) {
  const py::buffer_info info = buffer.request();
  if (info.ndim != 2 || info.shape[1] != 3 || info.itemsize != 8 ||
      (info.format != "L" && info.format != "Q") ||
      (info.size != 0 && (info.strides[1] != 8 || info.strides[0] != 24))) {
    throw py::value_error("copies must be a contiguous array of uint64 with three columns");
  }
  const auto* fields = static_cast<const std::uint64_t*>(info.ptr);
  std::vector<Copy> copies;
  copies.reserve(static_cast<std::size_t>(info.shape[0]));
  for (py::ssize_t row = 0; row < info.shape[0]; ++row, fields += 3) {
    copies.push_back({reinterpret_cast<const std::byte*>(fields[0]),
                      reinterpret_cast<std::byte*>(fields[1]),
                      static_cast<std::size_t>(fields[2])});
  }
  return copies;
}

std::vector<PackItem> to_items(const std::vector<PackTuple>& tuples) {
  std::vector<PackItem> items;
  items.reserve(tuples.size());
  for (const auto& [source, offset, size] : tuples) items.push_back({source, offset, size});
  return items;
}

// A contiguous view of a Python buffer, held open for the duration of a call.
class View {
 public:
  View(const py::object& object, const char* what, bool writable) {
    const int flags = PyBUF_SIMPLE | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(object.ptr(), &buffer_, flags) != 0) {
      PyErr_Clear();
      throw py::value_error(std::string(what) + " must be a contiguous " +
                            (writable ? "writable " : "") + "buffer");
    }
  }
  ~View() { PyBuffer_Release(&buffer_); }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  std::byte* data() const { return static_cast<std::byte*>(buffer_.buf); }
  std::size_t size() const { return static_cast<std::size_t>(buffer_.len); }

 private:
  Py_buffer buffer_{};
};

using PlaneFunction = void (*)(const std::byte*, std::byte*, std::size_t, std::size_t);

template <PlaneFunction Function>
void transform_planes(const py::object& source, const py::object& target, std::size_t item_bytes) {
  check_item_bytes(item_bytes);
  const View from(source, "source", false), to(target, "target", true);
  if (from.size() != to.size() || from.size() % item_bytes != 0) {
    throw py::value_error("source holds " + std::to_string(from.size()) + " bytes and target " +
                          std::to_string(to.size()) + ": both must be the same multiple of " +
                          std::to_string(item_bytes));
  }
  if (from.data() < to.data() + to.size() && to.data() < from.data() + from.size()) {
    throw py::value_error("source and target overlap");
  }
  const Unlocked unlocked;
  Function(from.data(), to.data(), item_bytes, from.size() / item_bytes);
}

// A job and the Python objects that own the memory it touches.
class CopyHandle {
 public:
  CopyHandle(std::shared_ptr<CopyJob> job, py::object keep)
      : job_(std::move(job)), keep_(std::move(keep)) {}
  ~CopyHandle() {
    // Whoever drops an unfinished handle drops the memory next: stop first.
    const Unlocked unlocked;
    job_->cancel();
  }
  CopyHandle(const CopyHandle&) = delete;
  CopyHandle& operator=(const CopyHandle&) = delete;

  std::size_t wait() { return job_->wait(); }
  bool wait_for(double timeout_s) {
    if (!(timeout_s >= 0 && timeout_s <= 1e9)) {
      throw std::invalid_argument("timeout_s must be 0 to 1e9");
    }
    return job_->wait_for(std::chrono::nanoseconds(static_cast<std::int64_t>(timeout_s * 1e9)));
  }
  void cancel() { job_->cancel(); }
  bool done() const { return job_->done(); }
  bool cancelled() const { return job_->cancelled(); }
  std::size_t size_bytes() const { return job_->size_bytes(); }
  std::size_t copied_bytes() const { return job_->copied_bytes(); }

 private:
  std::shared_ptr<CopyJob> job_;
  py::object keep_;
};

class DeviceHandle {
 public:
  DeviceHandle(std::shared_ptr<DeviceJob> job, py::object keep)
      : job_(std::move(job)), keep_(std::move(keep)) {}
  ~DeviceHandle() {
    const Unlocked unlocked;
    job_.reset();
  }
  DeviceHandle(const DeviceHandle&) = delete;
  DeviceHandle& operator=(const DeviceHandle&) = delete;

  bool done() const { return job_->done(); }
  std::size_t wait() { return job_->wait(); }
  std::size_t size_bytes() const { return job_->size_bytes(); }

 private:
  std::shared_ptr<DeviceJob> job_;
  py::object keep_;
};

void bind_copy(py::module_& module) {
  py::register_exception<CopyCancelled>(module, "CopyCancelledError", PyExc_RuntimeError);
  py::class_<CopyHandle>(module, "CopyHandle")
      .def("wait", &CopyHandle::wait, py::call_guard<Unlocked>())
      .def("wait_for", &CopyHandle::wait_for, py::arg("timeout_s"),
           py::call_guard<Unlocked>())
      .def("cancel", &CopyHandle::cancel, py::call_guard<Unlocked>())
      .def("done", &CopyHandle::done)
      .def("cancelled", &CopyHandle::cancelled)
      .def_property_readonly("size_bytes", &CopyHandle::size_bytes)
      .def_property_readonly("copied_bytes", &CopyHandle::copied_bytes);
  py::class_<CopyEngine>(module, "CopyEngine")
      .def(py::init<int, bool>(), py::arg("threads"), py::kw_only(),
           py::arg("low_priority") = false)
      .def(
          "submit",
          [](CopyEngine& engine, const py::buffer& array, py::object keep) {
            const std::vector<Copy> copies = read_copies(array);
            std::shared_ptr<CopyJob> job;
            {
              const Unlocked unlocked;
              job = engine.submit(copies);
            }
            return std::make_unique<CopyHandle>(std::move(job), std::move(keep));
          },
          py::arg("copies"), py::kw_only(), py::arg("keep") = py::none())
      .def(
          "submit",
          [](CopyEngine& engine, const std::vector<CopyTuple>& copies, py::object keep) {
            return std::make_unique<CopyHandle>(engine.submit(to_copies(copies)), std::move(keep));
          },
          py::arg("copies"), py::kw_only(), py::arg("keep") = py::none())
      .def(
          "copy",
          [](CopyEngine& engine, const std::vector<CopyTuple>& tuples) {
            const std::vector<Copy> copies = to_copies(tuples);
            const Unlocked unlocked;
            return engine.submit(copies)->wait();
          },
          py::arg("copies"))
      .def_property_readonly("threads", &CopyEngine::threads)
      .def_property_readonly("low_priority", &CopyEngine::low_priority);
}

void bind_arena(py::module_& module) {
  py::class_<Arena>(module, "Arena", py::buffer_protocol())
      .def_static("create", &Arena::create, py::arg("size_bytes"), py::kw_only(),
                  py::arg("name") = "spotspeed-arena")
      .def_static("attach", &Arena::attach, py::arg("fd"))
      .def("prefault", &Arena::prefault, py::arg("offset"), py::arg("size_bytes"),
           py::call_guard<Unlocked>())
      .def_property_readonly(
          "address",
          [](const Arena& arena) { return reinterpret_cast<std::uintptr_t>(arena.data()); })
      .def_property_readonly("size_bytes", &Arena::size)
      .def_property_readonly("fd", &Arena::fd)
      .def("huge_page_bytes", &Arena::huge_page_bytes, py::call_guard<Unlocked>())
      .def("__len__", &Arena::size)
      .def_buffer([](Arena& arena) {
        return py::buffer_info(reinterpret_cast<std::uint8_t*>(arena.data()),
                               static_cast<py::ssize_t>(arena.size()));
      });
}

void bind_planes(py::module_& module) {
  module.def("split_planes", &transform_planes<split_planes>, py::arg("source"),
             py::arg("target"), py::arg("item_bytes"));
  module.def("join_planes", &transform_planes<join_planes>, py::arg("source"), py::arg("target"),
             py::arg("item_bytes"));
  module.def("split_planes_scalar", &transform_planes<split_planes_scalar>, py::arg("source"),
             py::arg("target"), py::arg("item_bytes"));
  module.def("join_planes_scalar", &transform_planes<join_planes_scalar>, py::arg("source"),
             py::arg("target"), py::arg("item_bytes"));
  module.def("has_avx2", &has_avx2);
}

void bind_pack(py::module_& module) {
  module.def(
      "pack_host",
      [](const std::vector<PackTuple>& tuples, const py::object& target) {
        const std::vector<PackItem> items = to_items(tuples);
        const View to(target, "target", true);
        const Unlocked unlocked;
        pack_host(items, to.data(), to.size());
      },
      py::arg("items"), py::arg("target"));
  module.def(
      "pack_device",
      [](const std::vector<PackTuple>& tuples, std::uint64_t target, std::size_t target_bytes,
         std::uintptr_t stream) {
        const std::vector<PackItem> items = to_items(tuples);
        if (target == 0 || target + target_bytes < target) {
          throw py::value_error("target is null or wraps around");
        }
        const Unlocked unlocked;
        pack_device(items, target, target_bytes, stream);
      },
      py::arg("items"), py::arg("target"), py::arg("target_bytes"), py::kw_only(),
      py::arg("stream") = 0);
}

template <typename Engine>
std::unique_ptr<DeviceHandle> submit_device(Engine& engine, const py::buffer& array,
                                            std::uintptr_t after_event, py::object keep) {
  const std::vector<Copy> copies = read_copies(array);
  std::shared_ptr<DeviceJob> job;
  {
    const Unlocked unlocked;
    job = engine.submit(copies, after_event);
  }
  return std::make_unique<DeviceHandle>(std::move(job), std::move(keep));
}

void bind_device(py::module_& module) {
  py::register_exception<DeviceError>(module, "DeviceError", PyExc_RuntimeError);
  module.def("cuda_built", &cuda_built);
  module.def("cuda_device_count", &cuda_device_count, py::call_guard<Unlocked>());
  py::class_<RegisteredMemory>(module, "RegisteredMemory")
      .def(py::init([](std::uintptr_t address, std::size_t size, int device) {
             if (address == 0 || size == 0 || address + size < address) {
               throw py::value_error("memory to register is null, empty or wraps around");
             }
             const Unlocked unlocked;
             return std::make_unique<RegisteredMemory>(reinterpret_cast<std::byte*>(address), size,
                                                       device);
           }),
           py::arg("address"), py::arg("size_bytes"), py::kw_only(), py::arg("device"));
  py::class_<DeviceHandle>(module, "DeviceHandle")
      .def("wait", &DeviceHandle::wait, py::call_guard<Unlocked>())
      .def("done", &DeviceHandle::done)
      .def_property_readonly("size_bytes", &DeviceHandle::size_bytes);
  py::class_<DeviceCopyEngine>(module, "DeviceCopyEngine")
      .def(py::init<int, int>(), py::arg("device"), py::kw_only(), py::arg("streams") = 2)
      .def("submit", &submit_device<DeviceCopyEngine>, py::arg("copies"), py::kw_only(),
           py::arg("after_event") = 0, py::arg("keep") = py::none());
  py::class_<TwinCopyEngine>(module, "TwinCopyEngine")
      .def(py::init<std::size_t>(), py::kw_only(), py::arg("buffer_bytes") = kPackBufferBytes)
      .def("submit", &submit_device<TwinCopyEngine>, py::arg("copies"), py::kw_only(),
           py::arg("after_event") = 0, py::arg("keep") = py::none());
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Native parts of spotspeed: copies, shared arenas, byte planes, CUDA, the cut.";
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const std::system_error& failure) {
      // OSError(errno, message) becomes the subclass that the errno calls for.
      errno = failure.code().value();
      const py::object arguments =
          py::make_tuple(failure.code().value(), std::string(failure.what()));
      PyErr_SetObject(PyExc_OSError, arguments.ptr());
    }
  });
  py::module_::import("atexit").attr("register")(py::cpp_function(&Unlocked::end));
  bind_copy(module);
  bind_arena(module);
  bind_planes(module);
  bind_pack(module);
  bind_device(module);
  bind_cut(module);
  bind_control(module);
}
