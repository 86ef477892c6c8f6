// The CPU thread pool, also where the CPU backend is a plugin (GGML_BACKEND_DL) and only some names can be looked up.
#pragma once

#include "ggml-backend.h"
#include "ggml-cpu.h"

#ifdef _WIN32
#include <process.h>
#else
#include <unistd.h>
#endif

namespace mullama {

// Threads do not come along when a process forks: what they share is left alone in the child.
inline int process_id() {
#ifdef _WIN32
    return _getpid();
#else
    return (int) getpid();
#endif
}

#ifdef GGML_BACKEND_DL

inline void * cpu_function(const char * name) {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    return cpu == nullptr ? nullptr : ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), name);
}

inline ggml_threadpool_t pool_new(ggml_threadpool_params * params) {
    auto * make = (decltype(&ggml_threadpool_new)) cpu_function("ggml_threadpool_new");
    params->paused = false; // there is no name to resume it by
    return make == nullptr ? nullptr : make(params);
}

inline void pool_free(ggml_threadpool_t pool) {
    auto * release = (decltype(&ggml_threadpool_free)) cpu_function("ggml_threadpool_free");
    if (release != nullptr) release(pool);
}

// With poll 0 its threads sleep between graphs all the same.
inline void pool_pause(ggml_threadpool_t) {}
inline void pool_resume(ggml_threadpool_t) {}

#else

inline ggml_threadpool_t pool_new(ggml_threadpool_params * params) { return ggml_threadpool_new(params); }
inline void pool_free(ggml_threadpool_t pool) { ggml_threadpool_free(pool); }
inline void pool_pause(ggml_threadpool_t pool) { ggml_threadpool_pause(pool); }
inline void pool_resume(ggml_threadpool_t pool) { ggml_threadpool_resume(pool); }

#endif

} // namespace mullama
