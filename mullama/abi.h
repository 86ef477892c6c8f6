/* The instrumentation page: one shared mapping a model, written by its engine thread only.
 *
 * Layout rules: fixed-width integers, no pointers, little-endian, append-only; a change that moves a field
 * raises MULLAMA_ABI_VERSION. abi.py mirrors this file with ctypes and a test compares every offset.
 *
 * Reading without locks: counters and rows open with a sequence counter that is odd while the writer is inside,
 * and close with a checksum (sum of the 64-bit words between). A reader copies, then accepts the copy only if
 * the counter was even, did not change, and the checksum fits; this holds also where the processor reorders stores.
 * An event is valid when its `seq` equals its index + 1 before and after the copy. In C and C++ the first word is loaded
 * with acquire, the others relaxed, and after an acquire fence the first one again (tests/native/threads.cpp).
 *
 * The header is written once, but for `closed_ns`. An engine that ends sets it and removes the file; one that is killed
 * does neither, but it no longer holds the lock on the file (flock) that a living one has.
 *
 * Times are nanoseconds of CLOCK_MONOTONIC.
 */
#ifndef MULLAMA_ABI_H
#define MULLAMA_ABI_H

#include <stddef.h>
#include <stdint.h>

#define MULLAMA_ABI_MAGIC   0x00414D414C4C554Dull /* "MULLAMA\0", little-endian */
#define MULLAMA_ABI_VERSION 5u

/* F(type, name): every field is named once, here. */
#define MULLAMA_HEADER_FIELDS(F)                                                              \
    F(uint64_t, magic)                                                                        \
    F(uint32_t, version)                                                                      \
    F(uint32_t, header_size)                                                                  \
    F(uint64_t, page_size)        /* bytes of the whole mapping */                            \
    F(uint32_t, counters_offset)                                                              \
    F(uint32_t, counters_size)                                                                \
    F(uint32_t, rows_offset)                                                                  \
    F(uint32_t, row_size)                                                                     \
    F(uint32_t, n_rows)           /* one a slot; row i describes slot i */                    \
    F(uint32_t, events_offset)                                                                \
    F(uint32_t, event_size)                                                                   \
    F(uint32_t, n_events)         /* a power of two */                                        \
    F(uint64_t, pid)              /* of the engine, in its own namespace */                   \
    F(uint64_t, created_ns)                                                                   \
    F(uint64_t, closed_ns)        /* 0 as long as the engine may write */

#define MULLAMA_COUNTER_FIELDS(F)                                                             \
    F(uint64_t, lock)             /* odd while the writer is inside */                        \
    F(uint64_t, heartbeat_ns)     /* last time the engine finished a step or a wait */        \
    F(uint64_t, steps)            /* rounds over the plan */                                  \
    F(uint64_t, ubatches)         /* successful llama_decode calls, one ubatch each */        \
    F(uint64_t, split_ubatches)   /* extra ones because decoding slots had a hole */          \
    F(uint64_t, decode_ns)        /* wall time inside llama_decode */                         \
    F(uint64_t, busy_ns)          /* wall time with a sequence running */                     \
    F(uint64_t, sample_ns)                                                                    \
    F(uint64_t, commit_ns)        /* text assembly and ring */                                \
    F(uint64_t, plans)                                                                        \
    F(uint64_t, plan_ns)                                                                      \
    F(uint64_t, gil_wait_ns)      /* waiting for the GIL after a run */                       \
    F(uint64_t, prefill_tokens)                                                               \
    F(uint64_t, decode_tokens)                                                                \
    F(uint64_t, sampled_tokens)                                                               \
    F(uint64_t, graphs_reused)    /* llama_perf_context().n_reused */                         \
    F(uint64_t, ring_stalls)                                                                  \
    F(uint64_t, ring_stall_ns)                                                                \
    F(uint64_t, wakeups)          /* signals to the reader of the token ring */               \
    F(uint64_t, events)           /* events written so far; the ring keeps the last n_events */ \
    F(uint64_t, opened)                                                                       \
    F(uint64_t, finished_stop)                                                                \
    F(uint64_t, finished_length)                                                              \
    F(uint64_t, cancelled)                                                                    \
    F(uint64_t, failed)                                                                       \
    F(uint64_t, kv_hit_tokens)                                                                \
    F(uint64_t, kv_miss_tokens)                                                               \
    F(uint64_t, kv_evict_tokens)                                                              \
    F(uint64_t, kv_moves)                                                                     \
    F(uint64_t, kv_move_bytes)                                                                \
    F(uint64_t, kv_move_ns)                                                                   \
    F(uint64_t, decode_retries)   /* decodes given up at their deadline and run again */      \
    F(uint64_t, thread_changes)                                                               \
    F(uint64_t, threads)          /* gauge: threads of the last decode */                     \
    F(uint64_t, running)          /* gauge: open sequences */                                 \
    F(uint64_t, waiting)          /* gauge: requests in the admission queue */                \
    F(uint64_t, retained)         /* gauge: slots that keep a finished prefix */              \
    F(uint64_t, cells_used)       /* gauge: tokens in the KV cache */                         \
    F(uint64_t, preemptions)                                                                  \
    F(uint64_t, swap_bytes)       /* KV saved to and restored from host memory */             \
    F(uint64_t, swap_ns)                                                                      \
    F(uint64_t, parked)           /* gauge: preempted sequences */                            \
    F(uint64_t, parked_bytes)     /* gauge: host memory of their saved KV */                  \
    F(uint64_t, kv_store_bytes)   /* KV copied out of the context for the prefix tiers */     \
    F(uint64_t, kv_store_ns)                                                                  \
    F(uint64_t, kv_restore_bytes) /* KV put back into the context from them */                \
    F(uint64_t, kv_restore_ns)                                                                \
    F(uint64_t, kv_copy_bytes)    /* prefixes copied from one slot to another */              \
    F(uint64_t, kv_copy_ns)                                                                   \
    F(uint64_t, turn_wait_ns)     /* waiting while another engine computes */                 \
    F(uint64_t, weight_swaps)     /* times that other weights took over */                    \
    F(uint64_t, weight_swap_bytes) /* KV carried over to them */                              \
    F(uint64_t, weight_swap_ns)   /* engine time for changing over, first decodes excluded */ \
    F(uint64_t, weight_pause_ns)  /* gauge: last swap, last step before to first step after */ \
    F(uint64_t, weight_first_ns)  /* gauge: when the first step after the last swap ended */   \
    F(uint64_t, adapter_switches) /* times that another set of LoRA adapters was put in charge */ \
    F(uint64_t, adapter_ubatches) /* extra ubatches because decoding slots have different sets */ \
    F(uint64_t, checksum)

/* A row is copied whole into the finish record, so that profiles lose nothing. */
#define MULLAMA_ROW_FIELDS(F)                                                                 \
    F(uint64_t, lock)                                                                         \
    F(uint64_t, handle)           /* 0: nothing was ever here */                              \
    F(uint32_t, state)            /* MULLAMA_SLOT_* */                                        \
    F(int32_t,  slot)                                                                         \
    F(uint64_t, arrival_ns)                                                                   \
    F(uint64_t, opened_ns)        /* got its slot */                                          \
    F(uint64_t, started_ns)       /* first decode that held one of its tokens */              \
    F(uint64_t, first_token_ns)                                                               \
    F(uint64_t, last_token_ns)                                                                \
    F(uint64_t, finished_ns)                                                                  \
    F(uint32_t, prompt_tokens)                                                                \
    F(uint32_t, completion_tokens)                                                            \
    F(uint32_t, kv_cache_hit)                                                                 \
    F(uint32_t, kv_cache_miss)                                                                \
    F(uint32_t, kv_cache_evict)                                                               \
    F(uint32_t, cells)            /* tokens of it in the KV cache now */                      \
    F(uint32_t, ubatches)                                                                     \
    F(uint32_t, finish_reason)    /* MULLAMA_FINISH_* */                                      \
    F(uint64_t, batch_sum)        /* sequences of those ubatches, summed */                   \
    F(uint64_t, prefill_ns)                                                                   \
    F(uint64_t, decode_ns)                                                                    \
    F(uint64_t, sample_ns)                                                                    \
    F(uint32_t, threads_min)                                                                  \
    F(uint32_t, threads_max)                                                                  \
    F(int32_t,  priority)                                                                     \
    F(uint32_t, moves)            /* times its KV went to another slot */                     \
    F(uint32_t, preemptions)                                                                  \
    F(uint32_t, recomputed)       /* tokens computed again after preemptions */               \
    F(uint64_t, preempted_ns)     /* time without a slot because of them */                   \
    F(uint64_t, kv_cell_ns)       /* tokens in the KV cache, times ns that they were there */ \
    F(uint32_t, kv_source)        /* MULLAMA_KV_*: where the reused tokens came from */       \
    F(uint32_t, shifted)          /* tokens dropped to go on when the context was full */     \
    F(uint64_t, checksum)

#define MULLAMA_EVENT_FIELDS(F)                                                               \
    F(uint64_t, seq)              /* index of the event + 1; 0 while it is written */         \
    F(uint64_t, time_ns)                                                                      \
    F(uint64_t, handle)                                                                       \
    F(uint32_t, kind)             /* MULLAMA_SITE_* */                                        \
    F(int32_t,  slot)                                                                         \
    F(int64_t,  a)                                                                            \
    F(int64_t,  b)

#define MULLAMA_DECLARE(type, name) type name;
typedef struct mullama_header   { MULLAMA_HEADER_FIELDS(MULLAMA_DECLARE) } mullama_header;
typedef struct mullama_counters { MULLAMA_COUNTER_FIELDS(MULLAMA_DECLARE) } mullama_counters;
typedef struct mullama_row      { MULLAMA_ROW_FIELDS(MULLAMA_DECLARE) } mullama_row;
typedef struct mullama_event    { MULLAMA_EVENT_FIELDS(MULLAMA_DECLARE) } mullama_event;
#undef MULLAMA_DECLARE

enum {
    MULLAMA_SLOT_FREE     = 0,
    MULLAMA_SLOT_RETAINED = 1, /* finished; its tokens may serve as a prefix */
    MULLAMA_SLOT_PREFILL  = 2,
    MULLAMA_SLOT_DECODE   = 3,
    MULLAMA_SLOT_DONE     = 4  /* finished inside a run; the engine has not closed it yet */
};

enum {
    MULLAMA_FINISH_NONE      = 0,
    MULLAMA_FINISH_STOP      = 1,
    MULLAMA_FINISH_LENGTH    = 2,
    MULLAMA_FINISH_CANCELLED = 3,
    MULLAMA_FINISH_ERROR     = 4
};

enum {
    MULLAMA_KV_NONE     = 0,
    MULLAMA_KV_IN_PLACE = 1, /* the slot held them */
    MULLAMA_KV_COPY     = 2, /* another slot held them */
    MULLAMA_KV_HOST     = 3,
    MULLAMA_KV_DISK     = 4
};

/* The call sites where events are written and where hooks attach. S(NAME, number, what a and b hold). */
#define MULLAMA_SITES(S)                                                                      \
    S(OPEN,    1, "a = prompt tokens, b = reused tokens")                                     \
    S(PLAN,    2, "a = decoding sequences, b = prompt tokens")                                \
    S(UBATCH_BEGIN, 3, "a = tokens, b = sequences")                                           \
    S(UBATCH_END,   4, "a = nanoseconds, b = llama_decode's return code")                     \
    S(SAMPLE,  5, "a = token, b = nanoseconds")                                               \
    S(FINISH,  6, "a = reason, b = completion tokens")                                        \
    S(CLOSE,   7, "a = tokens retained")                                                      \
    S(MOVE,    8, "a = other slot, b = bytes")                                                \
    S(EVICT,   9, "a = tokens")                                                               \
    S(THREADS, 10, "a = new count, b = old count")                                            \
    S(RING_STALL, 11, "a = nanoseconds")                                                      \
    S(IDLE,    12, "a = nanoseconds waited")                                                  \
    S(PREEMPT, 13, "a = tokens in KV, b = bytes saved to host memory")                        \
    S(RESUME,  14, "a = tokens in KV, b = bytes restored")                                    \
    S(STORE,   15, "a = tokens copied out for the prefix tiers, b = bytes")                   \
    S(RESTORE, 16, "a = tokens put back from them, b = bytes")                                \
    S(COPY,    17, "a = slot that held the prefix, b = tokens")                               \
    S(SHIFT,   18, "a = tokens dropped, b = tokens left")                                     \
    S(WEIGHTS, 19, "a = running sequences that go on with other weights, b = bytes of KV carried over")

enum {
#define MULLAMA_SITE_ENUM(name, number, doc) MULLAMA_SITE_##name = number,
    MULLAMA_SITES(MULLAMA_SITE_ENUM)
#undef MULLAMA_SITE_ENUM
    MULLAMA_SITE_COUNT = 20
};

#endif
