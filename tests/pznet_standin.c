/* A stand-in for a compiled pznet: the calls of the real one, and the harm that it does around them.
 *
 * Output channel c of a voxel is weight[c] * square(voxel) + c, where `square` comes from a library
 * of its own, found as the real engine finds its convolutions. Shares no code with pznet.
 *
 * IN_SHAPE, OUT_SHAPE: five numbers each, b c z y x; the output may have lost a border.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static const long IN[5] = {IN_SHAPE};
static const long OUT[5] = {OUT_SHAPE};
static int num_nets = 0;
static float weight[8];
static float (*convolve)(float);

static void bind(int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core % (int)sysconf(_SC_NPROCESSORS_ONLN), &set);
    sched_setaffinity(0, sizeof set, &set);
}

static void *work(void *core) {
    bind((int)(long)core);
    for (;;) pause();
    return NULL;
}

static void start_worker(long core) {
    pthread_t thread;
    pthread_create(&thread, NULL, work, (void *)core);
    usleep(50000); /* until it has bound itself */
}

static void fail(const char *why, const char *what) {
    fprintf(stderr, "%s %s\n", why, what);
    exit(1);
}

static void read_weights(const char *folder) {
    char path[1024];
    snprintf(path, sizeof path, "%s%s", folder, "scale.data"); /* the folder ends in a slash */
    FILE *file = fopen(path, "rb");
    if (file == NULL) fail("cannot open", path);
    if (fread(weight, sizeof(float), OUT[1], file) != (size_t)OUT[1]) fail("too short:", path);
    fclose(file);
}

static void find_convolution(const char *folder) {
    char command[2048], path[1025];
    if (getenv("ZNNPHI_PATH") == NULL) fail("not set:", "ZNNPHI_PATH");
    if (getenv("PYTHONUNBUFFERED") != NULL) fail("broken by", "PYTHONUNBUFFERED");
    snprintf(command, sizeof command,
             "%s/cpp/include/znn/jit/jit.py LAYER=conv LIB_FOLDER=%s OFM=%ld BN=%ld ARCH=Any",
             getenv("ZNNPHI_PATH"), folder, OUT[1], IN[0]);
    printf("jit command: %s\n", command);
    fflush(stdout);
    FILE *answer = popen(command, "r");
    if (fscanf(answer, "%1024s", path) != 1) fail("no answer from", command);
    pclose(answer);
    void *library = dlopen(path, RTLD_NOW);
    if (library == NULL) fail("dlopen:", dlerror());
    convolve = (float (*)(float))dlsym(library, "square");
}

static PyObject *shape_list(const long *shape) {
    return Py_BuildValue("[lllll]", shape[0], shape[1], shape[2], shape[3], shape[4]);
}

typedef struct { PyObject_HEAD } Net;

static int net_init(PyObject *self, PyObject *args, PyObject *kwargs) {
    const char *weights, *libraries;
    if (!PyArg_ParseTuple(args, "ss", &weights, &libraries)) return -1;
    if (num_nets++) abort();
    read_weights(weights);
    find_convolution(libraries);
    bind(0);
    start_worker(1);
    return 0;
}

static PyObject *net_in_shape(PyObject *self, PyObject *none) { return shape_list(IN); }
static PyObject *net_out_shape(PyObject *self, PyObject *none) { return shape_list(OUT); }

static PyObject *net_forward(PyObject *self, PyObject *array) {
    static int num_calls = 0;
    Py_buffer in, out;
    if (num_calls++ == 0) start_worker(2); /* some start with the first forward */
    if (PyObject_GetBuffer(array, &in, PyBUF_C_CONTIGUOUS) < 0) return NULL;
    if (in.len != (Py_ssize_t)(sizeof(float) * IN[0] * IN[1] * IN[2] * IN[3] * IN[4]))
        fail("wrong number of elements", "");
    PyObject *numpy = PyImport_ImportModule("numpy");
    PyObject *result = PyObject_CallMethod(numpy, "empty", "Ns", shape_list(OUT), "float32");
    Py_DECREF(numpy);
    if (result == NULL || PyObject_GetBuffer(result, &out, PyBUF_WRITABLE) < 0) return NULL;
    const float *source = in.buf;
    float *target = out.buf;
    for (long b = 0; b < OUT[0]; b++)
        for (long c = 0; c < OUT[1]; c++)
            for (long z = 0; z < OUT[2]; z++)
                for (long y = 0; y < OUT[3]; y++)
                    for (long x = 0; x < OUT[4]; x++) {
                        long iz = z + (IN[2] - OUT[2]) / 2, iy = y + (IN[3] - OUT[3]) / 2;
                        long ix = x + (IN[4] - OUT[4]) / 2;
                        long at = ((b * IN[1] * IN[2] + iz) * IN[3] + iy) * IN[4] + ix;
                        *target++ = weight[c] * convolve(source[at]) + c;
                    }
    PyBuffer_Release(&in);
    PyBuffer_Release(&out);
    return result;
}

static PyMethodDef methods[] = {
    {"get_in_shape", net_in_shape, METH_NOARGS, NULL},
    {"get_out_shape", net_out_shape, METH_NOARGS, NULL},
    {"forward", net_forward, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject net_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "znet.znet",
    .tp_basicsize = sizeof(Net),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = net_init,
    .tp_methods = methods,
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "znet", .m_size = -1};

PyMODINIT_FUNC PyInit_znet(void) {
    if (PyType_Ready(&net_type) < 0) return NULL;
    PyObject *module = PyModule_Create(&definition);
    PyModule_AddObjectRef(module, "znet", (PyObject *)&net_type);
    return module;
}
