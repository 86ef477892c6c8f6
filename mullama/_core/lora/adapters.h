// LoRA adapters and the sets of them that sequences use. A set is put in charge of a context, never of a sequence.
#pragma once

#include "llama.h"
#include "llama-adapter.h"

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace mullama {

// An adapter on a model, or on none for a while. The model's list of adapters is changed under one lock, whoever loads
// or frees.
struct Lora {
    llama_adapter_lora * ptr = nullptr;
    const llama_model * model = nullptr;

    static std::mutex & lock() {
        static std::mutex mutex;
        return mutex;
    }

    Lora() = default;
    Lora(const Lora &) = delete;
    Lora & operator=(const Lora &) = delete;
    ~Lora() { free(); }

    void free() {
        if (ptr != nullptr) {
            const std::lock_guard<std::mutex> guard(lock());
            llama_adapter_lora_free(ptr);
            ptr = nullptr;
            model = nullptr;
        }
    }

    // Whoever holds one of them goes on with what the other one was.
    void exchange(Lora & other) {
        std::swap(ptr, other.ptr);
        std::swap(model, other.model);
    }
};

using LoraPtr = std::shared_ptr<Lora>;

// nullptr when llama.cpp refuses the file.
inline LoraPtr load_lora(llama_model * model, const char * path) {
    auto lora = std::make_shared<Lora>();
    const std::lock_guard<std::mutex> guard(Lora::lock());
    lora->ptr = llama_adapter_lora_init(model, path);
    lora->model = model;
    return lora->ptr != nullptr ? lora : nullptr;
}

inline size_t lora_bytes(const LoraPtr & lora) {
    size_t size = 0;
    for (const auto & buffer : lora->ptr->bufs) {
        size += ggml_backend_buffer_get_size(buffer.get());
    }
    return size;
}

// Those of them that are in this process's memory.
inline size_t lora_host_bytes(const LoraPtr & lora) {
    size_t size = 0;
    for (const auto & buffer : lora->ptr->bufs) {
        size += ggml_backend_buffer_is_host(buffer.get()) ? ggml_backend_buffer_get_size(buffer.get()) : 0;
    }
    return size;
}

inline size_t lora_tensors(const LoraPtr & lora) { return lora->ptr->ab_map.size(); }

// Adapters of one model with their scales, in an order that is the same for equal sets. No set at all is the bare model.
struct LoraSet {
    std::vector<std::pair<LoraPtr, float>> parts;
    bool is_new = true; // it was in charge of no decode yet
};

using LoraSetPtr = std::shared_ptr<LoraSet>;

inline LoraSetPtr new_set() { return std::make_shared<LoraSet>(); }

// False: the set has this adapter already.
inline bool add_to_set(const LoraSetPtr & set, const LoraPtr & lora, float scale) {
    size_t at = 0;
    for (const auto & part : set->parts) {
        if (part.first == lora) {
            return false;
        }
        at += part.first < lora;
    }
    set->parts.insert(set->parts.begin() + at, { lora, scale });
    return true;
}

inline bool same_set(const LoraSetPtr & a, const LoraSetPtr & b) {
    return a == b || (a && b && a->parts == b->parts);
}

// Let a context compute with a set from now on. False: an adapter is gone, or of another model.
inline bool use_set(llama_context * ctx, const LoraSetPtr & set) noexcept {
    try {
        std::vector<llama_adapter_lora *> loras;
        std::vector<float> scales;
        if (set) {
            for (const auto & part : set->parts) {
                if (part.first->ptr == nullptr || part.first->model != llama_get_model(ctx)) {
                    return false;
                }
                loras.push_back(part.first->ptr);
                scales.push_back(part.second);
            }
        }
        return llama_set_adapters_lora(ctx, loras.data(), loras.size(), scales.data()) == 0;
    } catch (...) {
        return false;
    }
}

} // namespace mullama
