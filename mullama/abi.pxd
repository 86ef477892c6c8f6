# The part of abi.h that the Cython modules touch by name.
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t


cdef extern from "../abi.h" nogil:
    const uint64_t MULLAMA_ABI_MAGIC
    const uint32_t MULLAMA_ABI_VERSION

    ctypedef struct mullama_header:
        uint64_t magic
        uint32_t version
        uint32_t header_size
        uint64_t page_size
        uint32_t counters_offset
        uint32_t counters_size
        uint32_t rows_offset
        uint32_t row_size
        uint32_t n_rows
        uint32_t events_offset
        uint32_t event_size
        uint32_t n_events
        uint64_t pid
        uint64_t created_ns
        uint64_t closed_ns

    ctypedef struct mullama_counters:
        uint64_t heartbeat_ns, steps, ubatches, split_ubatches, decode_ns, busy_ns, sample_ns, commit_ns
        uint64_t plans, plan_ns, gil_wait_ns, prefill_tokens, decode_tokens, sampled_tokens, graphs_reused
        uint64_t ring_stalls, ring_stall_ns, wakeups, events
        uint64_t opened, finished_stop, finished_length, cancelled, failed
        uint64_t kv_hit_tokens, kv_miss_tokens, kv_evict_tokens, kv_moves, kv_move_bytes, kv_move_ns
        uint64_t decode_retries, thread_changes, threads, running, waiting, retained, cells_used
        uint64_t preemptions, swap_bytes, swap_ns, parked, parked_bytes
        uint64_t kv_store_bytes, kv_store_ns, kv_restore_bytes, kv_restore_ns, kv_copy_bytes, kv_copy_ns
        uint64_t turn_wait_ns, weight_swaps, weight_swap_bytes, weight_swap_ns, weight_pause_ns, weight_first_ns
        uint64_t adapter_switches, adapter_ubatches

    ctypedef struct mullama_row:
        uint64_t handle
        uint32_t state
        int32_t slot
        uint64_t arrival_ns, opened_ns, started_ns, first_token_ns, last_token_ns, finished_ns
        uint32_t prompt_tokens, completion_tokens, kv_cache_hit, kv_cache_miss, kv_cache_evict
        uint32_t cells, ubatches, finish_reason
        uint64_t batch_sum, prefill_ns, decode_ns, sample_ns
        uint32_t threads_min, threads_max
        int32_t priority
        uint32_t moves, preemptions, recomputed
        uint64_t preempted_ns, kv_cell_ns
        uint32_t kv_source, shifted

    ctypedef struct mullama_event:
        uint64_t seq, time_ns, handle
        uint32_t kind
        int32_t slot
        int64_t a, b

    enum:
        MULLAMA_SLOT_FREE
        MULLAMA_SLOT_RETAINED
        MULLAMA_SLOT_PREFILL
        MULLAMA_SLOT_DECODE
        MULLAMA_SLOT_DONE
    enum:
        MULLAMA_FINISH_NONE
        MULLAMA_FINISH_STOP
        MULLAMA_FINISH_LENGTH
        MULLAMA_FINISH_CANCELLED
        MULLAMA_FINISH_ERROR
    enum:
        MULLAMA_KV_NONE
        MULLAMA_KV_IN_PLACE
    enum:
        MULLAMA_SITE_OPEN
        MULLAMA_SITE_PLAN
        MULLAMA_SITE_UBATCH_BEGIN
        MULLAMA_SITE_UBATCH_END
        MULLAMA_SITE_SAMPLE
        MULLAMA_SITE_FINISH
        MULLAMA_SITE_CLOSE
        MULLAMA_SITE_MOVE
        MULLAMA_SITE_EVICT
        MULLAMA_SITE_THREADS
        MULLAMA_SITE_RING_STALL
        MULLAMA_SITE_IDLE
        MULLAMA_SITE_PREEMPT
        MULLAMA_SITE_RESUME
        MULLAMA_SITE_STORE
        MULLAMA_SITE_RESTORE
        MULLAMA_SITE_COPY
        MULLAMA_SITE_SHIFT
        MULLAMA_SITE_WEIGHTS
