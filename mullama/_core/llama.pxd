# The used part of llama.h and ggml.h: declarations only.
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool as cbool


cdef extern from "ggml.h" nogil:
    ctypedef cbool (*ggml_abort_callback)(void * data) noexcept
    ctypedef enum ggml_type:
        GGML_TYPE_COUNT
    const char * ggml_type_name(ggml_type type)

cdef extern from "ggml-backend.h" nogil:
    ctypedef struct ggml_backend_device:
        pass
    ctypedef ggml_backend_device * ggml_backend_dev_t
    ctypedef enum ggml_backend_dev_type:
        GGML_BACKEND_DEVICE_TYPE_CPU
        GGML_BACKEND_DEVICE_TYPE_GPU
        GGML_BACKEND_DEVICE_TYPE_IGPU
        GGML_BACKEND_DEVICE_TYPE_ACCEL
    size_t ggml_backend_dev_count()
    ggml_backend_dev_t ggml_backend_dev_get(size_t index)
    ggml_backend_dev_t ggml_backend_dev_by_name(const char * name)
    const char * ggml_backend_dev_name(ggml_backend_dev_t device)
    const char * ggml_backend_dev_description(ggml_backend_dev_t device)
    void ggml_backend_dev_memory(ggml_backend_dev_t device, size_t * free, size_t * total)
    ggml_backend_dev_type ggml_backend_dev_get_type "ggml_backend_dev_type" (ggml_backend_dev_t device)
    void ggml_backend_load_all_from_path(const char * dir_path)

cdef extern from "pool.h" namespace "mullama" nogil:
    int process_id()

cdef extern from "llama.h" nogil:
    ctypedef struct llama_model:
        pass
    ctypedef struct llama_context:
        pass
    ctypedef struct llama_vocab:
        pass
    ctypedef struct llama_sampler:
        pass
    ctypedef struct llama_memory_i:
        pass
    ctypedef llama_memory_i * llama_memory_t
    ctypedef int32_t llama_token
    ctypedef int32_t llama_pos
    ctypedef int32_t llama_seq_id

    ctypedef enum llama_split_mode:
        LLAMA_SPLIT_MODE_NONE
        LLAMA_SPLIT_MODE_LAYER
        LLAMA_SPLIT_MODE_ROW
    ctypedef enum llama_load_mode:
        LLAMA_LOAD_MODE_NONE
        LLAMA_LOAD_MODE_MMAP
    ctypedef enum llama_flash_attn_type:
        LLAMA_FLASH_ATTN_TYPE_AUTO
        LLAMA_FLASH_ATTN_TYPE_DISABLED
        LLAMA_FLASH_ATTN_TYPE_ENABLED

    enum llama_pooling_type:  # there is a function of that name
        LLAMA_POOLING_TYPE_UNSPECIFIED
        LLAMA_POOLING_TYPE_NONE
        LLAMA_POOLING_TYPE_RANK

    ctypedef cbool (*llama_progress_callback)(float progress, void * user_data) noexcept

    ctypedef struct llama_model_params:
        ggml_backend_dev_t * devices
        int32_t n_gpu_layers
        llama_split_mode split_mode
        llama_load_mode load_mode
        int32_t main_gpu
        const float * tensor_split
        llama_progress_callback progress_callback
        void * progress_callback_user_data
        cbool vocab_only
        cbool use_extra_bufts
        cbool check_tensors

    ctypedef struct llama_context_params:
        uint32_t n_ctx
        uint32_t n_batch
        uint32_t n_ubatch
        uint32_t n_seq_max
        uint32_t n_outputs_max
        int32_t n_threads
        int32_t n_threads_batch
        llama_flash_attn_type flash_attn_type
        llama_pooling_type pooling_type
        ggml_type type_k
        ggml_type type_v
        ggml_abort_callback abort_callback
        void * abort_callback_data
        cbool embeddings
        cbool offload_kqv
        cbool no_perf
        cbool swa_full
        cbool kv_unified

    ctypedef struct llama_batch:
        int32_t n_tokens
        llama_token * token
        llama_pos * pos
        int32_t * n_seq_id
        llama_seq_id ** seq_id
        int8_t * logits

    ctypedef struct llama_token_data:
        llama_token id
        float logit
        float p
    ctypedef struct llama_token_data_array:
        llama_token_data * data
        size_t size
        int64_t selected
        cbool sorted
    ctypedef struct llama_logit_bias:
        llama_token token
        float bias
    ctypedef struct llama_sampler_chain_params:
        cbool no_perf

    const char * llama_version()
    void llama_backend_init()
    const char * llama_print_system_info()
    size_t llama_max_devices()
    size_t llama_max_parallel_sequences()

    llama_model_params llama_model_default_params()
    llama_context_params llama_context_default_params()
    llama_sampler_chain_params llama_sampler_chain_default_params()

    llama_model * llama_model_load_from_file(const char * path, llama_model_params params) except +
    llama_context * llama_init_from_model(llama_model * model, llama_context_params params) except +
    void llama_free(llama_context * ctx)
    void llama_detach_threadpool(llama_context * ctx)
    void llama_set_n_threads(llama_context * ctx, int32_t n_threads, int32_t n_threads_batch)

    uint32_t llama_n_ctx_seq(const llama_context * ctx)
    uint32_t llama_n_ctx(const llama_context * ctx)
    llama_memory_t llama_get_memory(const llama_context * ctx)
    const char * llama_vocab_get_text(const llama_vocab * vocab, llama_token token)
    size_t llama_state_get_size(llama_context * ctx) except +
    size_t llama_state_get_data(llama_context * ctx, uint8_t * dst, size_t size) except +
    size_t llama_state_set_data(llama_context * ctx, const uint8_t * src, size_t size) except +
    const llama_vocab * llama_model_get_vocab(const llama_model * model)
    int32_t llama_model_n_ctx_train(const llama_model * model)
    int32_t llama_model_n_embd(const llama_model * model)
    int32_t llama_model_n_embd_out(const llama_model * model)
    uint32_t llama_model_n_cls_out(const llama_model * model)
    int32_t llama_model_n_layer(const llama_model * model)
    int32_t llama_model_n_swa(const llama_model * model)
    int llama_model_rope_type(const llama_model * model)
    int32_t llama_model_desc(const llama_model * model, char * buf, size_t size)
    uint64_t llama_model_size(const llama_model * model)
    uint64_t llama_model_n_params(const llama_model * model)
    cbool llama_model_has_encoder(const llama_model * model)
    cbool llama_model_has_decoder(const llama_model * model)
    cbool llama_model_is_recurrent(const llama_model * model)
    cbool llama_model_is_hybrid(const llama_model * model)
    cbool llama_model_is_diffusion(const llama_model * model)
    int32_t llama_model_meta_count(const llama_model * model)
    int32_t llama_model_meta_key_by_index(const llama_model * model, int32_t i, char * buf, size_t size)
    int32_t llama_model_meta_val_str_by_index(const llama_model * model, int32_t i, char * buf, size_t size)

    int32_t llama_vocab_n_tokens(const llama_vocab * vocab)
    int llama_vocab_type(const llama_vocab * vocab)
    int LLAMA_VOCAB_TYPE_NONE
    int llama_vocab_get_attr(const llama_vocab * vocab, llama_token token)
    int LLAMA_TOKEN_ATTR_LSTRIP
    int LLAMA_TOKEN_ATTR_RSTRIP
    int LLAMA_TOKEN_ATTR_CONTROL
    int LLAMA_TOKEN_ATTR_UNKNOWN
    int LLAMA_TOKEN_ATTR_USER_DEFINED
    cbool llama_vocab_is_eog(const llama_vocab * vocab, llama_token token)
    int32_t llama_tokenize(const llama_vocab * vocab, const char * text, int32_t n, llama_token * tokens,
                           int32_t n_max, cbool add_special, cbool parse_special) except +
    int32_t llama_detokenize(const llama_vocab * vocab, const llama_token * tokens, int32_t n, char * text,
                             int32_t n_max, cbool remove_special, cbool unparse_special) except +
    int32_t llama_token_to_piece(const llama_vocab * vocab, llama_token token, char * buf, int32_t n,
                                 int32_t lstrip, cbool special)

    cbool llama_memory_seq_rm(llama_memory_t mem, llama_seq_id seq, llama_pos p0, llama_pos p1)
    void llama_memory_seq_add(llama_memory_t mem, llama_seq_id seq, llama_pos p0, llama_pos p1, llama_pos delta)
    cbool llama_memory_can_shift(llama_memory_t mem)
    void llama_memory_seq_cp(llama_memory_t mem, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1)
    void llama_memory_clear(llama_memory_t mem, cbool data)
    llama_pos llama_memory_seq_pos_min(llama_memory_t mem, llama_seq_id seq)
    size_t llama_state_seq_get_size(llama_context * ctx, llama_seq_id seq) except +
    size_t llama_state_seq_get_data(llama_context * ctx, uint8_t * dst, size_t size, llama_seq_id seq) except +
    size_t llama_state_seq_set_data(llama_context * ctx, const uint8_t * src, size_t size, llama_seq_id seq) except +
    enum:
        LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
    size_t llama_state_seq_get_size_ext(llama_context * ctx, llama_seq_id seq, uint32_t flags) except +
    size_t llama_state_seq_get_data_ext(llama_context * ctx, uint8_t * dst, size_t size, llama_seq_id seq,
                                        uint32_t flags) except +
    size_t llama_state_seq_set_data_ext(llama_context * ctx, const uint8_t * src, size_t size, llama_seq_id seq,
                                        uint32_t flags) except +

    llama_batch llama_batch_init(int32_t n_tokens, int32_t embd, int32_t n_seq_max)
    void llama_batch_free(llama_batch batch)
    void llama_synchronize(llama_context * ctx)
    float * llama_get_logits_ith(llama_context * ctx, int32_t i)

    llama_sampler * llama_sampler_chain_init(llama_sampler_chain_params params)
    void llama_sampler_chain_add(llama_sampler * chain, llama_sampler * smpl)
    void llama_sampler_free(llama_sampler * smpl)
    llama_sampler * llama_sampler_init_greedy()
    llama_sampler * llama_sampler_init_dist(uint32_t seed)
    llama_sampler * llama_sampler_init_top_k(int32_t k)
    llama_sampler * llama_sampler_init_top_p(float p, size_t min_keep)
    llama_sampler * llama_sampler_init_min_p(float p, size_t min_keep)
    llama_sampler * llama_sampler_init_typical(float p, size_t min_keep)
    llama_sampler * llama_sampler_init_temp(float t)
    llama_sampler * llama_sampler_init_xtc(float p, float t, size_t min_keep, uint32_t seed)
    llama_sampler * llama_sampler_init_mirostat(int32_t n_vocab, uint32_t seed, float tau, float eta, int32_t m)
    llama_sampler * llama_sampler_init_mirostat_v2(uint32_t seed, float tau, float eta)
    llama_sampler * llama_sampler_init_penalties(int32_t n_vocab, int32_t last_n, float repeat, float freq,
                                                 float present)
    llama_sampler * llama_sampler_init_dry(const llama_vocab * vocab, float multiplier, float base,
                                           int32_t allowed_length, int32_t last_n, const char ** breakers, size_t n)

cdef extern from "llama-cells.h" nogil:
    int32_t llama_cells_n_caches(const llama_context * ctx)
    uint32_t llama_cells_n_streams(const llama_context * ctx, int32_t cache)
    uint32_t llama_cells_size(const llama_context * ctx, int32_t cache)
    uint32_t llama_cells_used(const llama_context * ctx, int32_t cache, uint32_t stream, llama_seq_id seq)
    uint32_t llama_cells_read(const llama_context * ctx, int32_t cache, uint32_t stream, llama_pos * pos,
                              llama_seq_id * owner, uint32_t n)
    uint32_t llama_cells_recurrent(const llama_context * ctx, llama_seq_id * owner, uint32_t n)
    cbool llama_set_reference(llama_context * ctx, cbool on)
    ctypedef struct llama_cells_layer:
        int32_t layer, type_k, type_v
        uint32_t k_offset, k_bytes, v_offset, v_bytes
    uint64_t llama_cells_token_bytes(const llama_context * ctx, int32_t cache)
    int32_t llama_cells_n_layers(const llama_context * ctx, int32_t cache)
    cbool llama_cells_layer_at(const llama_context * ctx, int32_t cache, int32_t i, llama_cells_layer * out)
    ctypedef struct llama_buffer_at:
        int32_t part
        const char * name
        const void * base
        size_t size
    int32_t llama_buffers(const llama_context * ctx, llama_buffer_at * out, int32_t n) except +
    cbool llama_cells_get_rows(llama_context * ctx, int32_t cache, llama_seq_id seq, llama_pos p0, llama_pos p1,
                               void * dst) except +
    cbool llama_cells_put_rows(llama_context * ctx, int32_t cache, llama_seq_id seq, llama_pos p0, llama_pos p1,
                               const void * src) except +
    cbool llama_memory_exchange(llama_context * a, llama_context * b) except +
    cbool llama_cells_carry_rows(llama_context * src, llama_seq_id seq_src, llama_context * dst, llama_seq_id seq_dst,
                                 int32_t cache, llama_pos p0, llama_pos p1) except +
