/* A CUDA driver that runs nothing: it says yes to everything Triton asks, and writes down, as lines of
   JSON in the file that RECORD_TO names, the tensor maps it is asked to encode and the launches. */
#include "cuda.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SHARED_LIMIT 232448
#define MOST_PARAMETERS 64

static void write_list(FILE *file, const char *name, const unsigned long long *values, int count) {
  fprintf(file, ", \"%s\": [", name);
  for (int i = 0; i < count; i++) fprintf(file, "%s%llu", i ? ", " : "", values[i]);
  fprintf(file, "]");
}

static FILE *open_record(void) { return fopen(getenv("RECORD_TO"), "a"); }

CUresult cuInit(unsigned int flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 12080; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "none"; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = 0; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)1; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) { *function = (CUfunction)1; return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) { *count = 1; return CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  *value = which == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 132
         : which == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32 : SHARED_LIMIT;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute which, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer; /* host memory stands in for the device's */
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
    const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
    const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  FILE *file = open_record();
  unsigned long long wide_dims[5], wide_strides[5], wide_box[5];
  for (cuuint32_t i = 0; i < rank; i++) {
    wide_dims[i] = dims[i];
    wide_box[i] = box[i];
    wide_strides[i] = i + 1 < rank ? strides[i] : 0;
  }
  fprintf(file, "{\"call\": \"map\", \"address\": %llu", (unsigned long long)address);
  write_list(file, "dims", wide_dims, rank);
  write_list(file, "strides", wide_strides, rank - 1);
  write_list(file, "box", wide_box, rank);
  fprintf(file, "}\n");
  fclose(file);
  memset(map, 0, sizeof *map);
  memcpy(map, &address, sizeof address); /* so that a launch shows which map it was given */
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  /* How many parameters there are only the kernel knows; eight bytes of each, more than some have. */
  FILE *file = open_record();
  unsigned long long values[MOST_PARAMETERS];
  int count = atoi(getenv("RECORD_PARAMETERS"));
  for (int i = 0; i < count && i < MOST_PARAMETERS; i++) memcpy(&values[i], parameters[i], sizeof values[i]);
  fprintf(file, "{\"call\": \"launch\", \"grid\": %u, \"threads\": %u, \"shared_bytes\": %u",
          config->gridDimX, config->blockDimX, config->sharedMemBytes);
  write_list(file, "parameters", values, count);
  fprintf(file, "}\n");
  fclose(file);
  return CUDA_SUCCESS;
}
