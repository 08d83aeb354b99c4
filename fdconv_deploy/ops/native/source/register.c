/* The function that ONNX Runtime looks up in a custom operator library. */
#include <pthread.h>

#include "node.h"

/* One for all sessions, which keep a pointer to it. It is never released, and the library never
 * unloaded (build.py): threads' workspaces outlive sessions, too. */
static const OrtApi *api;
static OrtCustomOpDomain *domain;
static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;

__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                    const OrtApiBase *base);

static OrtStatus *make_domain(void) {
    if (domain) return NULL;
    OrtCustomOpDomain *made;
    OrtStatus *status = api->CreateCustomOpDomain("fdconv", &made);
    if (status) return status;
    status = assembly_register(made, api);
    if (!status) status = bands_register(made, api);
    if (status)
        api->ReleaseCustomOpDomain(made);
    else
        domain = made;
    return status;
}

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    const OrtApi *latest = base->GetApi(ORT_API_VERSION);
    if (!latest)
        return base->GetApi(1)->CreateStatus(
            ORT_FAIL, "fdconv's native operators need ONNX Runtime 1.17 or newer.");
    pthread_mutex_lock(&making);
    api = latest;
    OrtStatus *status = make_domain();
    pthread_mutex_unlock(&making);
    return status ? status : api->AddCustomOpDomain(options, domain);
}
