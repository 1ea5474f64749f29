// The Python module bertops._C. Importing it runs the static registrations of csrc/cpu and csrc/cuda;
// schemas are defined in bertops/_library.py.
#include <Python.h>

#include <exception>

#include "cpu/isa.h"

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* self = PyModule_Create(&module);
  if (self == nullptr) return nullptr;
  try {
    PyModule_AddStringConstant(self, "cpu_isa", bertops::cpu_isa_name());
  } catch (const std::exception& error) {
    Py_DECREF(self);
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
#ifdef BERTOPS_WITH_CUDA
  PyModule_AddIntConstant(self, "with_cuda", 1);
#else
  PyModule_AddIntConstant(self, "with_cuda", 0);
#endif
  return self;
}
