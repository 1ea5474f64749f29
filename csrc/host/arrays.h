// What the parts of bertops._host share: array types and their registration.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

namespace bertops {

namespace py = pybind11;

template <typename T>
using Input = py::array_t<T, py::array::c_style | py::array::forcecast>;

void define_masking(py::module_& module);
void define_token_packing(py::module_& module);
void define_segment_pairs(py::module_& module);

}  // namespace bertops
