/* The function that ONNX Runtime looks up in a custom operator library. */
#include <pthread.h>

#include "op.h"

/* One for all sessions, which keep a pointer to it. It is never released, and the library never
 * unloaded (build.py): threads' workspaces outlive sessions, too. */
static const OrtApi *api;
static OrtCustomOpDomain *domain, *blocked_domain;
static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;

__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                    const OrtApiBase *base);

static OrtStatus *make_domains(void) {
    if (domain) return NULL;
    OrtCustomOpDomain *made, *blocked;
    CHECK(api->CreateCustomOpDomain("fdconv", &made));
    OrtStatus *status = api->CreateCustomOpDomain("fdconv.nchwc", &blocked);
    if (status) {
        api->ReleaseCustomOpDomain(made);
        return status;
    }
    status = assembly_register(made, blocked, api);
    if (!status) status = blocked_bands_register(blocked, api);
    if (!status) status = attention_register(blocked, api);
    if (status) {
        api->ReleaseCustomOpDomain(made);
        api->ReleaseCustomOpDomain(blocked);
    } else {
        domain = made;
        blocked_domain = blocked;
    }
    return status;
}

/* A session takes 5 MB for the names of all functions, which a blocked graph may have none of. */
static _Thread_local int blocked_only;

__attribute__((visibility("default"))) void fdconv_blocked_only(int only);
void fdconv_blocked_only(int only) { blocked_only = only; }

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    const OrtApi *latest = base->GetApi(ORT_API_VERSION);
    if (!latest)
        return base->GetApi(1)->CreateStatus(
            ORT_FAIL, "fdconv's native operators need ONNX Runtime 1.17 or newer.");
    pthread_mutex_lock(&making);
    api = latest;
    OrtStatus *status = make_domains();
    pthread_mutex_unlock(&making);
    CHECK(status);
    if (!blocked_only) CHECK(api->AddCustomOpDomain(options, domain));
    return api->AddCustomOpDomain(options, blocked_domain);
}
