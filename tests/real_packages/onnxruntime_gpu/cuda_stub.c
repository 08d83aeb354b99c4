/* What has to answer for a CUDA program to start: one device (compute capability 9.0, 132
 * multiprocessors, 80 GB), memory from the host, streams and events that are never waited for.
 * Compiled into each of the libraries; see cuda_stub.py for the functions that only return 0. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* The head of cudaDeviceProp in CUDA 13. */
struct properties {
  char name[256], uuid[16], luid[8];
  unsigned node_mask;
  size_t memory, shared;
  int registers, warp;
  size_t pitch;
  int threads, threads_dim[3], grid[3];
  size_t constants;
  int major, minor;
  size_t texture_alignment, texture_pitch;
  int multiprocessors;
};

static int take(void **out, size_t size) {
  *out = aligned_alloc(512, (size + 1023) / 512 * 512);
  return *out ? 0 : 2; /* cudaErrorMemoryAllocation */
}

static int handle(void **out) { return take(out, 64); }

int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13000; return 0; }

int cudaGetDeviceProperties(struct properties *p, int device) {
  strcpy(p->name, "a stub of CUDA, no GPU");
  p->memory = 80ul << 30;
  p->shared = 49152;
  p->registers = 65536;
  p->warp = 32;
  p->threads = 1024;
  for (int i = 0; i < 3; i++) {
    p->threads_dim[i] = i < 2 ? 1024 : 64;
    p->grid[i] = i ? 65535 : 2147483647;
  }
  p->constants = 65536;
  p->major = 9;
  p->minor = 0;
  p->multiprocessors = 132;
  return 0;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  /* Multiprocessors, compute capability's two numbers; of anything else there is one. */
  *value = attribute == 16 ? 132 : attribute == 75 ? 9 : attribute == 76 ? 0 : 1;
  return 0;
}

int cudaMemGetInfo(size_t *unused, size_t *all) { *unused = 79ul << 30; *all = 80ul << 30; return 0; }
int cudaMalloc(void **out, size_t size) { return take(out, size); }
int cudaMallocHost(void **out, size_t size) { return take(out, size); }
int cudaHostAlloc(void **out, size_t size, unsigned flags) { return take(out, size); }
int cudaMallocFromPoolAsync(void **out, size_t size, void *pool, void *stream) {
  return take(out, size);
}
int cudaFree(void *memory) { free(memory); return 0; }
int cudaFreeHost(void *memory) { free(memory); return 0; }
int cudaFreeAsync(void *memory, void *stream) { free(memory); return 0; }

int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
  memmove(to, from, size);
  return 0;
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  memmove(to, from, size);
  return 0;
}
int cudaMemset(void *to, int value, size_t size) { memset(to, value, size); return 0; }
int cudaMemsetAsync(void *to, int value, size_t size, void *stream) {
  memset(to, value, size);
  return 0;
}

int cudaMemPoolCreate(void **out, const void *properties) { return handle(out); }
int cudaStreamCreate(void **out) { return handle(out); }
int cudaStreamCreateWithFlags(void **out, unsigned flags) { return handle(out); }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaEventCreate(void **out) { return handle(out); }
int cudaEventCreateWithFlags(void **out, unsigned flags) { return handle(out); }
int cublasCreate_v2(void **out) { return handle(out); }
int cublasLtCreate(void **out) { return handle(out); }

const char *cudaGetErrorName(int error) { return "cudaStub"; }
const char *cudaGetErrorString(int error) { return "there is no GPU"; }
const char *cublasGetStatusName(int status) { return "cublasStub"; }
const char *cublasGetStatusString(int status) { return "there is no GPU"; }

void **__cudaRegisterFatBinary(void *binary) { static void *kept[8]; return kept; }
int cudaGetDriverEntryPointByVersion(
    const char *name, void **out, unsigned version, unsigned long long flags, int *found) {
  *out = NULL;
  if (found) *found = 1; /* not found */
  return 0;
}
