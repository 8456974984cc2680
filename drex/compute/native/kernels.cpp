// What lies between the matrix products of a pass on a CPU. Python calls it through drex/compute/native/__init__.py.
//
// A row's result is the same to the last bit whatever the other rows of the pass are. Threads are those of torch: the
// OpenMP functions are left undefined here, and the loader finds those of the runtime that torch has brought.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#define ROUND_UP(count) (((count) + LANES - 1) / LANES * LANES)
#define INLINE static inline __attribute__((always_inline))

namespace {

const int TILE = 4;          // queries that attention computes at once
const int BLOCK = 1024;      // logits that are looked at at once
const int COLUMNS = 5;       // of what is found in logits
const long FEW_NUMBERS = 32768;  // up to as many, waking another thread takes longer than it would save
const long FEW_ITEMS = 8;    // pairs of a request and a K/V head, below which attention is split by query heads too

struct RotateAndWrite {
    const void *fused, *cos, *sin, *query_norm, *key_norm;
    void *queries, *keys, *values;
    const long *positions, *cells;
    long rows, query_rows, heads, kv_heads, head_dim;
    float eps;
};

struct Attend {
    const void *queries, *keys, *values;
    void *out;
    const long *first_rows, *sizes, *visible, *starts, *seats;
    const bool *in_run, *aliased;
    const int32_t *cells;
    long spans, longest_span, heads, kv_heads, head_dim, plane, num_cells, table_room;
    float scale;
};

// The kernels of one instruction set, each for float32 and bfloat16.
struct Kernels {
    void (*add_norm[2])(void *, const void *, const void *, float, void *, long, long);
    void (*gate[2])(const void *, void *, long, long);
    void (*rotate_and_write[2])(const RotateAndWrite &);
    void (*attend[2])(const Attend &);
    void (*summarise[2])(const void *, double *, long, long);
    void (*draw[2])(const void *, const float *, const float *, const int64_t *, int64_t *, long, long);
};

#define LANES 4
namespace plain {
#include "variant.h"
}
#undef LANES

#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define LANES 8
namespace avx2 {
#include "variant.h"
}
#undef LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#define LANES 16
namespace avx512 {
#include "variant.h"
}
#undef LANES
#pragma GCC pop_options
#endif

const Kernels *chosen = &plain::kernels;
const char *chosen_name = "plain";

// The widest instruction set that this processor has, up to the one that DREX_INSTRUCTION_SET names.
void choose() {
#if defined(__x86_64__) && !defined(__clang__)
    const char *asked = getenv("DREX_INSTRUCTION_SET");
    if (asked && !strcmp(asked, "plain")) return;
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return;
    chosen = &avx2::kernels, chosen_name = "avx2";
    if (asked && !strcmp(asked, "avx2")) return;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw"))) return;
    if (!(__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))) return;
    chosen = &avx512::kernels, chosen_name = "avx512";
#endif
}

// The arguments of a call: addresses and whole numbers, but for the last one where `real` takes it. The first says
// whether numbers are bfloat16.
template <int count> struct Arguments {
    long numbers[count];
    double real = 0;
    bool failed = false;

    Arguments(PyObject *const *given, Py_ssize_t size, bool last_is_real = false) {
        if (size != count + last_is_real) {
            PyErr_Format(PyExc_TypeError, "%d arguments wanted, %zd given", count + last_is_real, size);
            failed = true;
            return;
        }
        for (int i = 0; i < count; ++i) numbers[i] = PyLong_AsLong(given[i]);
        if (last_is_real) real = PyFloat_AsDouble(given[count]);
        failed = PyErr_Occurred() != nullptr;
    }

    template <typename T> T *at(int i) const { return (T *)numbers[i]; }
};

PyObject *call_add_norm(PyObject *, PyObject *const *given, Py_ssize_t size) {
    const Arguments<7> a(given, size, true);
    if (a.failed) return nullptr;
    Py_BEGIN_ALLOW_THREADS;
    chosen->add_norm[a.numbers[0]](a.at<void>(1), a.at<void>(2), a.at<void>(3), (float)a.real, a.at<void>(4),
                                   a.numbers[5], a.numbers[6]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

PyObject *call_gate(PyObject *, PyObject *const *given, Py_ssize_t size) {
    const Arguments<5> a(given, size);
    if (a.failed) return nullptr;
    Py_BEGIN_ALLOW_THREADS;
    chosen->gate[a.numbers[0]](a.at<void>(1), a.at<void>(2), a.numbers[3], a.numbers[4]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

PyObject *call_rotate_and_write(PyObject *, PyObject *const *given, Py_ssize_t size) {
    const Arguments<16> a(given, size, true);
    if (a.failed) return nullptr;
    const long *n = a.numbers;
    const RotateAndWrite what = {a.at<void>(1), a.at<void>(2), a.at<void>(3), a.at<void>(4), a.at<void>(5),
                                 a.at<void>(6), a.at<void>(7), a.at<void>(8), a.at<long>(9), a.at<long>(10),
                                 n[11],         n[12],         n[13],         n[14],         n[15],
                                 (float)a.real};
    Py_BEGIN_ALLOW_THREADS;
    chosen->rotate_and_write[n[0]](what);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

PyObject *call_attend(PyObject *, PyObject *const *given, Py_ssize_t size) {
    const Arguments<21> a(given, size, true);
    if (a.failed) return nullptr;
    const long *n = a.numbers;
    const Attend what = {a.at<void>(1),  a.at<void>(2),  a.at<void>(3), a.at<void>(4), a.at<long>(5),
                         a.at<long>(6),  a.at<long>(7),  a.at<long>(8), a.at<long>(9), a.at<bool>(10),
                         a.at<bool>(11), a.at<int32_t>(12), n[13],      n[14],         n[15],
                         n[16],          n[17],          n[18],         n[19],         n[20],
                         (float)a.real};
    Py_BEGIN_ALLOW_THREADS;
    chosen->attend[n[0]](what);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

PyObject *call_summarise(PyObject *, PyObject *const *given, Py_ssize_t size) {
    const Arguments<5> a(given, size);
    if (a.failed) return nullptr;
    Py_BEGIN_ALLOW_THREADS;
    chosen->summarise[a.numbers[0]](a.at<void>(1), a.at<double>(2), a.numbers[3], a.numbers[4]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

PyObject *call_draw(PyObject *, PyObject *const *given, Py_ssize_t size) {
    const Arguments<8> a(given, size);
    if (a.failed) return nullptr;
    Py_BEGIN_ALLOW_THREADS;
    chosen->draw[a.numbers[0]](a.at<void>(1), a.at<float>(2), a.at<float>(3), a.at<int64_t>(4), a.at<int64_t>(5),
                               a.numbers[6], a.numbers[7]);
    Py_END_ALLOW_THREADS;
    Py_RETURN_NONE;
}

#define FUNCTION(name) {#name, (PyCFunction)(void (*)(void))call_##name, METH_FASTCALL, nullptr}
PyMethodDef functions[] = {
    FUNCTION(add_norm), FUNCTION(gate), FUNCTION(rotate_and_write), FUNCTION(attend), FUNCTION(summarise),
    FUNCTION(draw),     {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__kernels() {
    choose();
    PyObject *made = PyModule_Create(&module);
    if (made) PyModule_AddStringConstant(made, "instruction_set", chosen_name);
    return made;
}
