/* A libcuda.so.1 that prints what a kernel is launched with, and does nothing. Pointers are 8 bytes. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static int parameters;

static int nothing(void) { return 0; }

static int load(void **module, const char *ptx) {
    parameters = ptx[0] - '0'; /* the check's PTX begins with how many there are */
    printf("load %s\n", ptx);
    *module = (void *)0x10;
    return 0;
}

static int function(void **found, void *module, const char *name) {
    printf("function %s of %p\n", name, module);
    *found = (void *)0x20;
    return 0;
}

static int launch(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                  unsigned shared, void *stream, void **given, void **extra) {
    printf("launch %p grid %u %u %u block %u %u %u shared %u stream %p extra %p with", f, gx, gy, gz,
           bx, by, bz, shared, stream, (void *)extra);
    for (int i = 0; i < parameters; i++)
        printf(" %llu", (unsigned long long)*(uint64_t *)given[i]);
    printf("\n");
    fflush(stdout);
    return 0;
}

int cuGetProcAddress_v2(const char *symbol, void **found, int version, uint64_t flags, int *status) {
    (void)version, (void)flags;
    if (status)
        *status = 0;
    *found = (void *)nothing;
    if (!strcmp(symbol, "cuModuleLoadData"))
        *found = (void *)load;
    if (!strcmp(symbol, "cuModuleGetFunction"))
        *found = (void *)function;
    if (!strcmp(symbol, "cuLaunchKernel"))
        *found = (void *)launch;
    if (!strncmp(symbol, "cuGetProcAddress", 16))
        *found = (void *)cuGetProcAddress_v2;
    return 0;
}

int cuGetProcAddress(const char *symbol, void **found, int version, uint64_t flags) {
    return cuGetProcAddress_v2(symbol, found, version, flags, 0);
}
