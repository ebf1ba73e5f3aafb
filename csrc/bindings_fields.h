// Turns values of the cut protocol into tuples of Python.
//
// Lifetime: what is returned belongs to Python.
// Threads: whoever holds the GIL.
// Alignment: none required.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cut_actions.h"

namespace spotspeed {

namespace py = pybind11;


inline py::object to_python(std::int64_t value) { return py::int_(value); }
inline py::object to_python(bool value) { return py::bool_(value); }
inline py::object to_python(double value) { return py::float_(value); }
inline py::object to_python(const std::string& value) { return py::str(value); }
inline py::object to_python(const cut::Blob& value) { return py::bytes(value.bytes); }
inline py::object to_python(const cut::Cut& value);
template <typename T>
py::object to_python(const std::optional<T>& value);

template <typename T>
py::object to_python(const std::vector<T>& values) {
  py::tuple found(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) found[i] = to_python(values[i]);
  return found;
}

template <typename T>
py::object to_python(const std::optional<T>& value) {
  return value ? to_python(*value) : py::none();
}

template <typename Struct>
py::tuple fields_of(const Struct& value) {
  return std::apply([](const auto&... field) { return py::make_tuple(to_python(field)...); },
                    value.fields());
}

inline py::object to_python(const cut::Cut& value) { return fields_of(value); }

}  // namespace spotspeed
