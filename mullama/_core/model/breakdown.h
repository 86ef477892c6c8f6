// What a model and a context have allocated, by kind of buffer (llama-ext.h keeps it in a C++ map).
#pragma once

#include "llama-ext.h"

#include "ggml-backend.h"
#include "llama.h"

#include <string>
#include <vector>

namespace mullama {

struct BufferUse {
    std::string name;
    bool   is_host = true;
    size_t model = 0, context = 0, compute = 0; // bytes
};

inline std::vector<BufferUse> memory_of(const llama_context * ctx) {
    std::vector<BufferUse> found;
    for (const auto & entry : llama_get_memory_breakdown(ctx)) {
        BufferUse use;
        use.name    = ggml_backend_buft_name(entry.first);
        use.is_host = ggml_backend_buft_is_host(entry.first);
        use.model   = entry.second.model;
        use.context = entry.second.context;
        use.compute = entry.second.compute;
        found.push_back(use);
    }
    return found;
}

} // namespace mullama
