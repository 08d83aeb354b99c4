/* What the operators share. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "op.h"

const char no_memory[] = "there is not enough memory";
const char unknown[] = "its constants are not laid out as this version knows";
static const char older[] =
    "it lacks attributes that nodes have since bundle format 3; export the bundle again";

void *aligned(size_t bytes) { return aligned_alloc(64, (bytes + 63) & ~(size_t)63); }

OrtStatus *failure(const Kernel *kernel, const char *why) {
    char message[320];
    snprintf(message, sizeof message, "the native operator fdconv::%s cannot run: %s",
             kernel->op->name, why);
    return kernel->api->CreateStatus(ORT_FAIL, message);
}

/* Shape, type and data of a tensor. */
static OrtStatus *read_tensor(const OrtApi *api, const OrtValue *value, Tensor *to) {
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

size_t elements(const Tensor *tensor, int type) {
    size_t count = tensor->type == type;
    for (int i = 0; i < tensor->rank; i++) {
        if (tensor->shape[i] < 1 || tensor->shape[i] > MOST_LENGTH) return 0;
        count *= (size_t)tensor->shape[i];
    }
    return count;
}

OrtStatus *read_input(const Kernel *kernel, OrtKernelContext *context, int index, Tensor *to) {
    const OrtValue *value;
    CHECK(kernel->api->KernelContext_GetInput(context, (size_t)index, &value));
    return read_tensor(kernel->api, value, to);
}

OrtStatus *read_constant(const Kernel *kernel, const OrtKernelInfo *info, size_t index,
                         Tensor *to) {
    const OrtValue *value = NULL;
    int constant = 0;
    CHECK(kernel->api->KernelInfoGetConstantInput_tensor(info, index, &constant, &value));
    return constant ? read_tensor(kernel->api, value, to) : NULL;
}

/* What a missing attribute is answered with, in place of the runtime's own words. */
static OrtStatus *missing(const Kernel *kernel, OrtStatus *status) {
    kernel->api->ReleaseStatus(status);
    return failure(kernel, older);
}

OrtStatus *read_int(const Kernel *kernel, const OrtKernelInfo *info, const char *name, int *to) {
    int64_t value;
    OrtStatus *status = kernel->api->KernelInfoGetAttribute_int64(info, name, &value);
    if (status) return missing(kernel, status);
    if (value < 0 || value > MOST_LENGTH) return failure(kernel, unknown);
    *to = (int)value;
    return NULL;
}

int read_flag(const Kernel *kernel, const OrtKernelInfo *info, const char *name) {
    int64_t value = 0;
    OrtStatus *status = kernel->api->KernelInfoGetAttribute_int64(info, name, &value);
    if (status) kernel->api->ReleaseStatus(status);
    return !status && value;
}

OrtStatus *read_ints(const Kernel *kernel, const OrtKernelInfo *info, const char *name, int **to,
                     size_t *count) {
    const OrtApi *api = kernel->api;
    *count = 0;
    OrtStatus *status = api->KernelInfoGetAttributeArray_int64(info, name, NULL, count);
    if (status) return missing(kernel, status);
    if (*count < 1 || *count > MOST_LENGTH) return failure(kernel, unknown);
    int64_t *values = malloc(*count * sizeof *values);
    *to = malloc(*count * sizeof **to);
    status = !values || !*to
                 ? failure(kernel, no_memory)
                 : api->KernelInfoGetAttributeArray_int64(info, name, values, count);
    for (size_t i = 0; !status && i < *count; i++) {
        if (values[i] < -1 || values[i] > MOST_LENGTH) status = failure(kernel, unknown);
        (*to)[i] = (int)values[i];
    }
    free(values);
    return status;
}

OrtStatus *read_pair(const Kernel *kernel, const OrtKernelInfo *info, const char *name, int *first,
                     int *second) {
    int *both = NULL;
    size_t count;
    OrtStatus *status = read_ints(kernel, info, name, &both, &count);
    if (!status && count != 2) {
        char why[96];
        snprintf(why, sizeof why, "its %s is not of two numbers", name);
        status = failure(kernel, why);
    }
    if (!status) {
        *first = both[0];
        *second = both[1];
    }
    free(both);
    return status;
}

OrtStatus *read_float(const Kernel *kernel, const OrtKernelInfo *info, const char *name,
                      float *to) {
    OrtStatus *status = kernel->api->KernelInfoGetAttribute_float(info, name, to);
    return status ? missing(kernel, status) : NULL;
}

OrtStatus *make_output(const Kernel *kernel, OrtKernelContext *context, int index,
                       const int64_t *shape, int rank, float **to) {
    OrtValue *output;
    void *data;
    CHECK(kernel->api->KernelContext_GetOutput(context, (size_t)index, shape, (size_t)rank,
                                               &output));
    CHECK(kernel->api->GetTensorMutableData(output, &data));
    *to = data;
    return NULL;
}

OrtStatus *parallel(const Kernel *kernel, OrtKernelContext *context,
                    void (*step)(void *run, size_t unit), size_t units, void *run) {
    return kernel->api->KernelContext_ParallelFor(context, step, units, units, run);
}

enum { OF_UNITS, OF_CALLS, KINDS };
static pthread_key_t keys[KINDS];
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int keys_made;

static void make_keys(void) {
    keys_made = !pthread_key_create(&keys[OF_UNITS], free) &&
                !pthread_key_create(&keys[OF_CALLS], free);
}

static float *space(int kind, size_t floats) {
    enum { HEADER = 64 }; /* the size, and then the data at an aligned address */
    pthread_once(&once, make_keys);
    if (!keys_made) return NULL;
    char *block = pthread_getspecific(keys[kind]);
    if (block && *(size_t *)block >= floats) return (float *)(block + HEADER);
    free(block);
    block = aligned(floats * sizeof(float) + HEADER);
    if (block) *(size_t *)block = floats;
    if (pthread_setspecific(keys[kind], block)) {
        free(block);
        return NULL;
    }
    return block ? (float *)(block + HEADER) : NULL;
}

float *workspace(size_t floats) { return space(OF_UNITS, floats); }

float *call_space(size_t floats) { return space(OF_CALLS, floats); }

static void destroy(void *made) {
    Kernel *kernel = made;
    kernel->op->release(kernel);
    free(kernel);
}

static OrtStatus *create(const OrtCustomOp *custom, const OrtApi *api, const OrtKernelInfo *info,
                         void **out) {
    const Op *op = (const Op *)custom;
    const Kernel head = {api, op};
    Kernel *kernel = calloc(1, op->kernel_size);
    if (!kernel) return failure(&head, no_memory);
    *kernel = head;
    OrtStatus *status = op->make(kernel, info);
    if (status)
        destroy(kernel);
    else
        *out = kernel;
    return status;
}

#define ANSWER(name, type, ...)      \
    static type name(__VA_ARGS__) {  \
        (void)op;
#define INDEXED(name, answer)        \
    ANSWER(name, int, const OrtCustomOp *op, size_t index) (void)index; return answer; }
#define PLAIN(name, type, answer)    \
    ANSWER(name, type, const OrtCustomOp *op) return answer; }

PLAIN(get_name, const char *, ((const Op *)op)->name)
PLAIN(least_inputs, int, ((const Op *)op)->least_inputs)
PLAIN(provider, const char *, NULL)
PLAIN(one, size_t, 1)
PLAIN(version, int, 1)
PLAIN(heterogeneous, int, 0)
PLAIN(homogeneous, int, 1)
INDEXED(any_type, ORT_UNDEFINED)
INDEXED(float_type, ORT_FLOAT)
INDEXED(variadic, ORT_VARIADIC)
INDEXED(memory, 0)

OrtStatus *add_op(OrtCustomOpDomain *domain, const OrtApi *api, Op *op) {
    op->op = (OrtCustomOp){
        .version = ORT_API_VERSION,
        .GetName = get_name,
        .GetExecutionProviderType = provider,
        .GetInputType = any_type,
        .GetInputTypeCount = one,
        .GetOutputType = float_type,
        .GetOutputTypeCount = one,
        .GetInputCharacteristic = variadic,
        .GetOutputCharacteristic = variadic,
        .GetInputMemoryType = memory,
        .GetVariadicInputMinArity = least_inputs,
        .GetVariadicInputHomogeneity = heterogeneous,
        .GetVariadicOutputMinArity = version,
        .GetVariadicOutputHomogeneity = homogeneous,
        .GetStartVersion = version,
        .GetEndVersion = version,
        .CreateKernelV2 = create,
        .KernelComputeV2 = op->compute,
        .KernelDestroy = destroy,
    };
    return api->CustomOpDomain_Add(domain, &op->op);
}
