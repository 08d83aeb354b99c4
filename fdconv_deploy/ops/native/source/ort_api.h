/* What this library uses of ONNX Runtime's C API, declared by hand.
 *
 * The API is a table of functions whose order never changes: new versions append. Each function
 * used here stands at its place in the table, the ones between are left as pointers; the
 * assertions below hold the places. Version 17 is the first with KernelContext_ParallelFor, so
 * the library needs ONNX Runtime 1.17 or newer and asks for nothing later.
 */
#ifndef FDCONV_ORT_API_H
#define FDCONV_ORT_API_H

#include <stddef.h>
#include <stdint.h>

#define ORT_API_VERSION 17

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtCustomOp OrtCustomOp;
typedef struct OrtApi OrtApi;

enum { ORT_FAIL = 1 };
/* ONNXTensorElementDataType */
enum { ORT_UNDEFINED = 0, ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT32 = 6 };
/* OrtCustomOpInputOutputCharacteristic */
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1, ORT_VARIADIC = 2 };

struct OrtApi {
    OrtStatus *(*CreateStatus)(int code, const char *message);
    void *before_domains[25];
    OrtStatus *(*CreateCustomOpDomain)(const char *domain, OrtCustomOpDomain **out);
    OrtStatus *(*CustomOpDomain_Add)(OrtCustomOpDomain *domain, const OrtCustomOp *op);
    OrtStatus *(*AddCustomOpDomain)(OrtSessionOptions *options, OrtCustomOpDomain *domain);
    void *before_data[22];
    OrtStatus *(*GetTensorMutableData)(OrtValue *value, void **out);
    void *before_type[8];
    OrtStatus *(*GetTensorElementType)(const OrtTensorTypeAndShapeInfo *info, int *out);
    OrtStatus *(*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo *info, size_t *out);
    OrtStatus *(*GetDimensions)(const OrtTensorTypeAndShapeInfo *info, int64_t *out, size_t count);
    void *before_shape[2];
    OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *value, OrtTensorTypeAndShapeInfo **out);
    void *before_attribute[19];
    OrtStatus *(*KernelInfoGetAttribute_float)(const OrtKernelInfo *info, const char *name,
                                               float *out);
    OrtStatus *(*KernelInfoGetAttribute_int64)(const OrtKernelInfo *info, const char *name,
                                               int64_t *out);
    void *before_inputs[1];
    OrtStatus *(*KernelContext_GetInputCount)(const OrtKernelContext *context, size_t *out);
    void *before_input[1];
    OrtStatus *(*KernelContext_GetInput)(const OrtKernelContext *context, size_t index,
                                         const OrtValue **out);
    OrtStatus *(*KernelContext_GetOutput)(OrtKernelContext *context, size_t index,
                                          const int64_t *shape, size_t rank, OrtValue **out);
    void *before_status[1];
    void (*ReleaseStatus)(OrtStatus *status);
    void *before_info[5];
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo *info);
    void *before_domain[1];
    void (*ReleaseCustomOpDomain)(OrtCustomOpDomain *domain);
    void *before_attributes[61];
    OrtStatus *(*KernelInfoGetAttributeArray_int64)(const OrtKernelInfo *info, const char *name,
                                                    int64_t *out, size_t *count);
    void *before_count[66];
    OrtStatus *(*KernelInfo_GetInputCount)(const OrtKernelInfo *info, size_t *out);
    void *before_constants[18];
    OrtStatus *(*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo *info, size_t index,
                                                    int *is_constant, const OrtValue **out);
    void *before_parallel[24];
    OrtStatus *(*KernelContext_ParallelFor)(const OrtKernelContext *context,
                                            void (*run)(void *data, size_t index), size_t total,
                                            size_t batches, void *data);
};

#define ORT_PLACE(function, place)                                                          \
    _Static_assert(offsetof(OrtApi, function) == (place) * sizeof(void *), #function)
ORT_PLACE(CreateCustomOpDomain, 26);
ORT_PLACE(GetTensorMutableData, 51);
ORT_PLACE(GetTensorElementType, 60);
ORT_PLACE(GetTensorTypeAndShape, 65);
ORT_PLACE(KernelInfoGetAttribute_float, 85);
ORT_PLACE(KernelInfoGetAttribute_int64, 86);
ORT_PLACE(KernelContext_GetInputCount, 88);
ORT_PLACE(KernelContext_GetInput, 90);
ORT_PLACE(ReleaseStatus, 93);
ORT_PLACE(ReleaseTensorTypeAndShapeInfo, 99);
ORT_PLACE(ReleaseCustomOpDomain, 101);
ORT_PLACE(KernelInfoGetAttributeArray_int64, 163);
ORT_PLACE(KernelInfo_GetInputCount, 230);
ORT_PLACE(KernelInfoGetConstantInput_tensor, 249);
ORT_PLACE(KernelContext_ParallelFor, 274);

typedef struct {
    const OrtApi *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)(void);
} OrtApiBase;

/* A custom operator. Null pointers are functions that version 17 may leave out. */
struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info);
    const char *(*GetName)(const OrtCustomOp *op);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *op);
    int (*GetInputType)(const OrtCustomOp *op, size_t index);
    size_t (*GetInputTypeCount)(const OrtCustomOp *op);
    int (*GetOutputType)(const OrtCustomOp *op, size_t index);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *op);
    void (*KernelCompute)(void *kernel, OrtKernelContext *context);
    void (*KernelDestroy)(void *kernel);
    int (*GetInputCharacteristic)(const OrtCustomOp *op, size_t index);
    int (*GetOutputCharacteristic)(const OrtCustomOp *op, size_t index);
    int (*GetInputMemoryType)(const OrtCustomOp *op, size_t index);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *op);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *op);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *op);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *op);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *op, const OrtApi *api,
                                 const OrtKernelInfo *info, void **kernel);
    OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *context);
    OrtStatus *(*InferOutputShape)(const OrtCustomOp *op, OrtShapeInferContext *context);
    int (*GetStartVersion)(const OrtCustomOp *op);
    int (*GetEndVersion)(const OrtCustomOp *op);
    size_t (*GetMayInplace)(int **inputs, int **outputs);
    void (*ReleaseMayInplace)(int *inputs, int *outputs);
    size_t (*GetAliasMap)(int **inputs, int **outputs);
    void (*ReleaseAliasMap)(int *inputs, int *outputs);
};

#endif
