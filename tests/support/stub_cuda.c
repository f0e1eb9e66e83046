/* A CUDA driver without a device, to see what would be launched: every call succeeds, launches are written down. */
#include <stdint.h>
#include <string.h>
#include "cuda.h"

#define MOST_FUNCTIONS 16
#define MOST_LAUNCHES 16
#define MOST_PARAMETERS 128
#define MOST_BYTES 8192

typedef struct {
  char name[256];
  int parameters;
  int sizes[MOST_PARAMETERS];
} Function;

typedef struct {
  int function, grid[3], block, shared, bytes;
  uint64_t stream;
  unsigned char parameters[MOST_BYTES];
} Launch;

static Function functions[MOST_FUNCTIONS];
static int known = 0;
int launches = 0;
Launch last[MOST_LAUNCHES];  /* The last launch comes last. */

/* The number of a function, from 1; 0 if there are too many. */
int find(const char *name) {
  for (int i = 0; i < known; ++i)
    if (!strcmp(functions[i].name, name)) return i + 1;
  if (known == MOST_FUNCTIONS) return 0;
  strncpy(functions[known].name, name, 255);
  return ++known;
}

void declare(const char *name, int parameters, const int *sizes) {
  Function *function = &functions[find(name) - 1];
  function->parameters = parameters;
  memcpy(function->sizes, sizes, parameters * sizeof(int));
}

CUresult cuInit(unsigned int flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "stub"; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)1; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { *status = 0; return CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    default: *value = 232448; /* Shared memory; nobody looks at the rest. */
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)(uintptr_t)find(name);
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
  *(CUdeviceptr *)value = address;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttributes(unsigned int count, CUpointer_attribute *kinds, void **values, CUdeviceptr address) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

/* The address, then all that was asked for. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  uint64_t *words = (uint64_t *)map;
  memset(map, 0, sizeof(CUtensorMap));
  words[0] = (uint64_t)address;
  for (unsigned i = 0; i < rank; ++i) words[1 + i] = shape[i] | (uint64_t)box[i] << 40 | (uint64_t)steps[i] << 56;
  for (unsigned i = 0; i + 1 < rank; ++i) words[6 + i] = strides[i];
  words[10] = type | swizzle << 8 | interleave << 16 | promotion << 20 | fill << 24;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  Function *called = &functions[(uintptr_t)function - 1];
  Launch *launch = &last[MOST_LAUNCHES - 1];
  memmove(last, last + 1, (MOST_LAUNCHES - 1) * sizeof(Launch));
  memset(launch, 0, sizeof(Launch));
  launch->function = (int)(uintptr_t)function;
  launch->grid[0] = config->gridDimX;
  launch->grid[1] = config->gridDimY;
  launch->grid[2] = config->gridDimZ;
  launch->block = config->blockDimX;
  launch->shared = config->sharedMemBytes;
  launch->stream = (uint64_t)config->hStream;
  for (int i = 0; i < called->parameters; ++i) {
    memcpy(launch->parameters + launch->bytes, parameters[i], called->sizes[i]);
    launch->bytes += called->sizes[i];
  }
  ++launches;
  return CUDA_SUCCESS;
}
