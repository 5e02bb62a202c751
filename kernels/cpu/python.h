// The part of CPython's stable ABI that direct_call.cpp uses, declared here: the library builds
// without Python's headers, one binary serves every version, and no object is looked into. The
// functions are weak, so that a process without Python loads the library too.
#pragma once

#include <cstddef>

struct PyObject;
using PyObjects = PyObject* const*;

#define NNARCH_PYTHON extern "C" __attribute__((weak))

struct PyMethodDef {
  const char* name;
  PyObject* (*function)(PyObject* self, PyObjects arguments, std::ptrdiff_t count);
  int flags;
  const char* doc;
};
constexpr int kFastCall = 0x0080;  // METH_FASTCALL

NNARCH_PYTHON PyObject* PyCFunction_NewEx(PyMethodDef*, PyObject* self, PyObject* module);
NNARCH_PYTHON PyObject* PyCFunction_GetSelf(PyObject*);  // borrowed
NNARCH_PYTHON PyObject* PyCapsule_New(void*, const char* name, void (*destructor)(PyObject*));
NNARCH_PYTHON void* PyCapsule_GetPointer(PyObject*, const char* name);
NNARCH_PYTHON PyObject* PyObject_CallNoArgs(PyObject* callable);
NNARCH_PYTHON PyObject* PyObject_CallFunctionObjArgs(PyObject* callable, ...);
NNARCH_PYTHON PyObject* PyObject_CallObject(PyObject* callable, PyObject* tuple);
NNARCH_PYTHON PyObject* PyObject_Str(PyObject*);
NNARCH_PYTHON PyObject* PyObject_GetAttrString(PyObject*, const char* name);
NNARCH_PYTHON int PyObject_IsInstance(PyObject*, PyObject* type);
NNARCH_PYTHON PyObject* PyObject_GetAttr(PyObject*, PyObject* name);
NNARCH_PYTHON PyObject* PyObject_Type(PyObject*);
NNARCH_PYTHON PyObject* PyTuple_New(std::ptrdiff_t);
NNARCH_PYTHON std::ptrdiff_t PyTuple_Size(PyObject*);
NNARCH_PYTHON PyObject* PyTuple_GetItem(PyObject*, std::ptrdiff_t);            // borrowed
NNARCH_PYTHON int PyTuple_SetItem(PyObject*, std::ptrdiff_t, PyObject* item);  // takes `item`
NNARCH_PYTHON std::ptrdiff_t PyList_Size(PyObject*);
NNARCH_PYTHON PyObject* PyList_GetItem(PyObject*, std::ptrdiff_t);  // borrowed
NNARCH_PYTHON long long PyLong_AsLongLong(PyObject*);
NNARCH_PYTHON PyObject* PyLong_FromLongLong(long long);
NNARCH_PYTHON PyObject* PyFloat_FromDouble(double);
NNARCH_PYTHON const char* PyUnicode_AsUTF8AndSize(PyObject*, std::ptrdiff_t*);
NNARCH_PYTHON double PyFloat_AsDouble(PyObject*);
NNARCH_PYTHON PyObject* PyErr_Occurred();
NNARCH_PYTHON void PyErr_Clear();
NNARCH_PYTHON void PyErr_Fetch(PyObject** type, PyObject** value, PyObject** traceback);
NNARCH_PYTHON void Py_IncRef(PyObject*);
NNARCH_PYTHON void Py_DecRef(PyObject*);
NNARCH_PYTHON int PyGILState_Ensure();
NNARCH_PYTHON void PyGILState_Release(int);
NNARCH_PYTHON void* PyEval_SaveThread();
NNARCH_PYTHON void PyEval_RestoreThread(void*);
