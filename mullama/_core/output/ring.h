// Single-producer, single-consumer ring of variable-size records: the way of tokens from the engine to the web.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

namespace mullama {

enum RecordKind : uint16_t { RECORD_PAD = 0, RECORD_TEXT = 1, RECORD_FINISH = 2 };

struct RecordHeader {
    uint32_t size;     // bytes of the whole record, a multiple of 8
    uint16_t kind;
    uint16_t n_tokens; // RECORD_TEXT: tokens that this text completes
    uint64_t handle;
};

struct FinishBody {
    uint32_t reason;    // MULLAMA_FINISH_*
    int32_t  stop_index; // which stop string ended it, -1 for none
    int32_t  error;     // why it failed, a CoreError
    uint32_t unused;
};

// Law: head and tail only grow; [tail, head) holds whole records; a record never wraps, a PAD record fills the end.
class Ring {
  public:
    explicit Ring(uint32_t capacity) : buffer(capacity), mask(capacity - 1) {}

    // Two parts, written one after the other. False: no room now.
    bool push(const RecordHeader & header, const void * body, uint32_t body_size, const void * tail_data, uint32_t tail_size) {
        const uint32_t size = (uint32_t) ((sizeof(RecordHeader) + body_size + tail_size + 7u) & ~7u);
        const uint64_t capacity = buffer.size();
        uint64_t at = head.load(std::memory_order_relaxed);
        const uint64_t to_end = capacity - (at & mask);
        const uint64_t need = size <= to_end ? size : to_end + size;
        if (at + need - tail.load(std::memory_order_acquire) > capacity) {
            return false;
        }
        if (size > to_end) {
            // Sizes are multiples of 8, so at least 8 bytes are left: enough for size and kind.
            const uint32_t pad[2] = { (uint32_t) to_end, RECORD_PAD };
            std::memcpy(&buffer[at & mask], pad, sizeof pad);
            at += to_end;
        }
        RecordHeader h = header;
        h.size = size;
        uint8_t * out = &buffer[at & mask];
        std::memcpy(out, &h, sizeof h);
        if (body_size) std::memcpy(out + sizeof h, body, body_size);
        if (tail_size) std::memcpy(out + sizeof h + body_size, tail_data, tail_size);
        head.store(at + size, std::memory_order_release);
        return true;
    }

    // The oldest record, or nullptr. It stays valid until pop().
    const RecordHeader * peek() {
        uint64_t at = tail.load(std::memory_order_relaxed);
        const uint64_t end = head.load(std::memory_order_acquire);
        while (at < end) {
            const auto * header = (const RecordHeader *) &buffer[at & mask];
            if ((header->kind) != RECORD_PAD) {
                return header;
            }
            at += header->size;
            tail.store(at, std::memory_order_release);
        }
        return nullptr;
    }

    void pop() {
        const uint64_t at = tail.load(std::memory_order_relaxed);
        const auto * header = (const RecordHeader *) &buffer[at & mask];
        tail.store(at + header->size, std::memory_order_release);
    }

    // Bytes that wait, from any thread. Both ends may have moved between the two looks: never less than nothing, nor more
    // than there is room for.
    uint64_t used() const {
        const uint64_t read = tail.load(std::memory_order_acquire);
        const uint64_t bytes = head.load(std::memory_order_acquire) - read;
        return bytes < capacity() ? bytes : capacity();
    }

    uint64_t capacity() const { return buffer.size(); }

  private:
    std::vector<uint8_t> buffer; // a power of two
    uint64_t mask;
    // A cache line apart, by hand: Python aligns the object that this lies in to 16 bytes, and a compiler believes alignas.
    std::atomic<uint64_t> head{0};
    char between[64];
    std::atomic<uint64_t> tail{0};
};

} // namespace mullama
