/* What the operators share. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "op.h"

OrtStatus *failure(const OrtApi *api, const char *name, const char *why) {
    char message[320];
    snprintf(message, sizeof message, "the native operator fdconv::%s cannot run: %s", name, why);
    return api->CreateStatus(ORT_FAIL, message);
}

OrtStatus *read_tensor(const OrtApi *api, const OrtValue *value, Tensor *to) {
    OrtTensorTypeAndShapeInfo *info;
    size_t rank = 0;
    CHECK(api->GetTensorTypeAndShape(value, &info));
    OrtStatus *status = api->GetTensorElementType(info, &to->type);
    if (!status) status = api->GetDimensionsCount(info, &rank);
    if (rank > MOST_RANK) rank = MOST_RANK;
    if (!status) status = api->GetDimensions(info, to->shape, rank);
    api->ReleaseTensorTypeAndShapeInfo(info);
    if (status) return status;
    to->rank = (int)rank;
    void *data;
    CHECK(api->GetTensorMutableData((OrtValue *)value, &data)); /* only read, whatever its name */
    to->data = data;
    return NULL;
}

OrtStatus *read_input(const OrtApi *api, OrtKernelContext *context, int index, Tensor *to) {
    const OrtValue *value;
    CHECK(api->KernelContext_GetInput(context, (size_t)index, &value));
    return read_tensor(api, value, to);
}

OrtStatus *read_constant(const OrtApi *api, const OrtKernelInfo *info, size_t index, Tensor *to) {
    const OrtValue *value = NULL;
    int constant = 0;
    CHECK(api->KernelInfoGetConstantInput_tensor(info, index, &constant, &value));
    return constant ? read_tensor(api, value, to) : NULL;
}

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int key_made;

static void make_key(void) { key_made = !pthread_key_create(&key, free); }

float *workspace(size_t floats) {
    enum { HEADER = 64 }; /* the size, and then the data at an aligned address */
    pthread_once(&once, make_key);
    if (!key_made) return NULL;
    char *block = pthread_getspecific(key);
    if (block && *(size_t *)block >= floats) return (float *)(block + HEADER);
    free(block);
    size_t bytes = (floats * sizeof(float) + HEADER + 63) & ~(size_t)63;
    block = aligned_alloc(64, bytes);
    if (block) *(size_t *)block = floats;
    if (pthread_setspecific(key, block)) {
        free(block);
        return NULL;
    }
    return block ? (float *)(block + HEADER) : NULL;
}

int instruction_set(void) {
    int best = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        best = 1;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
            best = 2;
    }
    const char *most = getenv("FDCONV_NATIVE_ISA");
    if (most && !strcmp(most, "baseline")) best = 0;
    if (most && !strcmp(most, "avx2") && best > 1) best = 1;
#endif
    return best;
}

#define ANSWER(name, type, ...)      \
    static type name(__VA_ARGS__) {  \
        (void)op;
#define INDEXED(name, answer)        \
    ANSWER(name, int, const OrtCustomOp *op, size_t index) (void)index; return answer; }
#define PLAIN(name, type, answer)    \
    ANSWER(name, type, const OrtCustomOp *op) return answer; }

PLAIN(provider, const char *, NULL)
PLAIN(one, size_t, 1)
PLAIN(version, int, 1)
PLAIN(heterogeneous, int, 0)
INDEXED(any_type, ORT_UNDEFINED)
INDEXED(float_type, ORT_FLOAT)
INDEXED(variadic, ORT_VARIADIC)
INDEXED(required, ORT_REQUIRED)
INDEXED(memory, 0)

OrtCustomOp variadic_op(void) {
    return (OrtCustomOp){
        .version = ORT_API_VERSION,
        .GetExecutionProviderType = provider,
        .GetInputType = any_type,
        .GetInputTypeCount = one,
        .GetOutputType = float_type,
        .GetOutputTypeCount = one,
        .GetInputCharacteristic = variadic,
        .GetOutputCharacteristic = required,
        .GetInputMemoryType = memory,
        .GetVariadicInputHomogeneity = heterogeneous,
        .GetVariadicOutputMinArity = version,
        .GetVariadicOutputHomogeneity = heterogeneous,
        .GetStartVersion = version,
        .GetEndVersion = version,
    };
}
