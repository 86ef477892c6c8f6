// Writing the instrumentation page. The law is in abi.h.
#pragma once

#include "../../abi.h"

#include <atomic>
#include <cstddef>
#include <cstring>

namespace mullama {

static_assert(sizeof(std::atomic<uint64_t>) == sizeof(uint64_t), "the page needs lock-free 64-bit words");

// Publish a block whose first word is the lock and whose last word is the checksum.
template <typename Block> inline void publish(Block * out, const Block & in) {
    static_assert(sizeof(Block) % 8 == 0, "blocks are made of 64-bit words");
    constexpr size_t n = sizeof(Block) / 8;
    uint64_t words[n];
    std::memcpy(words, &in, sizeof in);
    auto * dst = reinterpret_cast<std::atomic<uint64_t> *>(out);
    const uint64_t lock = dst[0].load(std::memory_order_relaxed) & ~1ull;
    dst[0].store(lock + 1, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
    uint64_t sum = 0;
    for (size_t i = 1; i + 1 < n; ++i) {
        dst[i].store(words[i], std::memory_order_relaxed);
        sum += words[i];
    }
    dst[n - 1].store(sum, std::memory_order_relaxed);
    dst[0].store(lock + 2, std::memory_order_release);
}

// A word outside blocks, written once readers may be there: `closed_ns` of the header.
inline void publish_word(uint64_t * out, uint64_t value) {
    reinterpret_cast<std::atomic<uint64_t> *>(out)->store(value, std::memory_order_release);
}

// SAFETY: readers copy while this writes, and what another thread reads meanwhile must be atomic, word by word.
inline void publish_event(mullama_event * ring, uint32_t n_events, uint64_t index, const mullama_event & event) {
    static_assert(offsetof(mullama_event, seq) == 0 && sizeof(mullama_event) % 8 == 0, "the first word is the lock");
    constexpr size_t n = sizeof(mullama_event) / 8;
    uint64_t words[n];
    std::memcpy(words, &event, sizeof event);
    auto * dst = reinterpret_cast<std::atomic<uint64_t> *>(&ring[index & (n_events - 1)]);
    dst[0].store(0, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
    for (size_t i = 1; i < n; ++i) {
        dst[i].store(words[i], std::memory_order_relaxed);
    }
    dst[0].store(index + 1, std::memory_order_release);
}

// The layout as the compiler sees it, for the test of abi.py.
struct FieldInfo {
    const char * block;
    const char * name;
    uint32_t offset;
    uint32_t size;
};

inline const FieldInfo * fields(size_t & n) {
#define MULLAMA_INFO(block, type, name) { #block, #name, (uint32_t) offsetof(mullama_##block, name), (uint32_t) sizeof(type) },
#define MULLAMA_INFO_HEADER(type, name)  MULLAMA_INFO(header, type, name)
#define MULLAMA_INFO_COUNTER(type, name) MULLAMA_INFO(counters, type, name)
#define MULLAMA_INFO_ROW(type, name)     MULLAMA_INFO(row, type, name)
#define MULLAMA_INFO_EVENT(type, name)   MULLAMA_INFO(event, type, name)
    static const FieldInfo table[] = {
        MULLAMA_HEADER_FIELDS(MULLAMA_INFO_HEADER)
        MULLAMA_COUNTER_FIELDS(MULLAMA_INFO_COUNTER)
        MULLAMA_ROW_FIELDS(MULLAMA_INFO_ROW)
        MULLAMA_EVENT_FIELDS(MULLAMA_INFO_EVENT)
    };
#undef MULLAMA_INFO
#undef MULLAMA_INFO_HEADER
#undef MULLAMA_INFO_COUNTER
#undef MULLAMA_INFO_ROW
#undef MULLAMA_INFO_EVENT
    n = sizeof table / sizeof table[0];
    return table;
}

struct SiteInfo {
    const char * name;
    uint32_t number;
    const char * doc;
};

inline const SiteInfo * sites(size_t & n) {
#define MULLAMA_SITE_INFO(name, number, doc) { #name, number, doc },
    static const SiteInfo table[] = { MULLAMA_SITES(MULLAMA_SITE_INFO) };
#undef MULLAMA_SITE_INFO
    n = sizeof table / sizeof table[0];
    return table;
}

} // namespace mullama
