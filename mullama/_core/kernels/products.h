// Products of weights with columns, computed as a model would have them computed: to try and to time ways of computing.
#pragma once

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace mullama {

inline ggml_backend_dev_t cpu_device() {
    ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (device == nullptr) {
        throw std::runtime_error("llama.cpp's library for this processor (ggml-cpu) is not loaded");
    }
    return device;
}

// A function of the CPU backend, also where that is a plugin which nothing links. nullptr: this build has none.
template <typename F> F cpu_function(const char * name) {
    return (F) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu_device()), name);
}

// nullptr: no such layout on this machine. "": the layout of the file.
inline ggml_backend_buffer_type_t layout_by_name(const std::string & name) {
    if (name.empty()) {
        return ggml_backend_dev_buffer_type(cpu_device());
    }
    auto extra = cpu_function<ggml_backend_dev_get_extra_bufts_t>("ggml_backend_dev_get_extra_bufts");
    for (auto * buft = extra != nullptr ? extra(cpu_device()) : nullptr; buft != nullptr && *buft != nullptr; ++buft) {
        if (name == ggml_backend_buft_name(*buft)) {
            return *buft;
        }
    }
    return nullptr;
}

inline std::vector<std::string> layout_names() {
    std::vector<std::string> names;
    auto extra = cpu_function<ggml_backend_dev_get_extra_bufts_t>("ggml_backend_dev_get_extra_bufts");
    for (auto * buft = extra != nullptr ? extra(cpu_device()) : nullptr; buft != nullptr && *buft != nullptr; ++buft) {
        names.push_back(ggml_backend_buft_name(*buft));
    }
    return names;
}

inline void set_kernel(int type, int log2_columns, int kernel) {
    if (auto set = cpu_function<void (*)(int, int, int)>("ggml_cpu_kernel_set")) {
        set(type, log2_columns, kernel);
    }
}

inline void set_attention(bool on) {
    if (auto set = cpu_function<void (*)(bool)>("ggml_cpu_attention_set")) {
        set(on);
    }
}

// Whether this build has exact-attention.h for this processor and it is on.
inline bool has_attention() {
    auto has = cpu_function<bool (*)(ggml_type, ggml_type, int, int)>("ggml_exact_attention_has");
    return has != nullptr && has(GGML_TYPE_F16, GGML_TYPE_F16, 64, 64);
}

inline void kernel_counts(uint64_t * counts) {
    if (auto get = cpu_function<void (*)(uint64_t *)>("ggml_cpu_kernel_counts")) {
        get(counts);
    }
}

// How the columns lie in memory.
enum class Columns { dense, strided, batched };

struct Difference {
    bool is_finite = true;
    bool is_exact  = true;   // every bit
    double error   = 0.0;    // root of the squared differences over the squared reference
};

inline Difference compare(const std::vector<float> & found, const std::vector<float> & wanted) {
    if (found.size() != wanted.size()) {
        throw std::invalid_argument("results of different shapes");
    }
    Difference res;
    double off = 0.0;
    double all = 0.0;
    for (size_t i = 0; i < wanted.size(); ++i) {
        res.is_finite = res.is_finite && std::isfinite(found[i]);
        const double d = (double) found[i] - wanted[i];
        off += d*d;
        all += (double) wanted[i]*wanted[i];
    }
    res.is_exact = memcmp(found.data(), wanted.data(), wanted.size()*sizeof(float)) == 0;
    res.error    = res.is_finite ? std::sqrt(off/(all > 0.0 ? all : 1.0)) : std::numeric_limits<double>::infinity();
    return res;
}

// Numbers that look normal enough, the same on every machine.
struct Noise {
    uint64_t state;
    explicit Noise(uint64_t seed) : state(seed) {}
    float next() {
        int sum = 0;
        for (int i = 0; i < 4; ++i) {
            state = state*6364136223846793005ull + 1442695040888963407ull;
            sum += (int) (state >> 48);
        }
        return (float) (sum - 2*65535)/65535.0f;
    }
};

// `copies` matrices of n rows of k values of one type, in one layout. Throws std::invalid_argument for what cannot be.
class Products {
public:
    Products(int type, int64_t k, int64_t n, const std::string & layout, int copies) :
        type((ggml_type) type), k(k), n(n), backend(ggml_backend_dev_init(cpu_device(), nullptr)) {
        if (type < 0 || type >= GGML_TYPE_COUNT || ggml_blck_size(this->type) == 0 || k <= 0 || n <= 0 || k % ggml_blck_size(this->type) != 0) {
            throw std::invalid_argument("no matrix of this type has rows of this length");
        }
        ggml_backend_buffer_type_t buft = layout_by_name(layout);
        if (buft == nullptr) {
            throw std::invalid_argument("no layout named " + layout + " here");
        }
        if (copies < 1 || !is_weights(this->type)) {
            throw std::invalid_argument("there are no matrices of this type");
        }
        const ggml_init_params params = { ggml_tensor_overhead()*copies, nullptr, true };
        ctx.reset(ggml_init(params));
        if (!layout.empty() && !fits(buft)) {
            throw std::invalid_argument("such a matrix has no layout named " + layout);
        }
        for (int i = 0; i < copies; ++i) {
            weights.push_back(ggml_new_tensor_2d(ctx.get(), this->type, k, n));
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
        if (!backend || !buffer) {
            throw std::runtime_error("no memory for the weights to try");
        }
        ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        const std::vector<uint8_t> data = quantized();
        for (auto * w : weights) {
            ggml_backend_tensor_set(w, data.data(), 0, data.size());
        }
    }

    // Whether the backend would compute such a product with weights in this layout.
    bool can(int64_t m, Columns columns) {
        Graph graph(*this, m, columns, 1);
        return ggml_backend_supports_op(backend.get(), graph.results[0]);
    }

    // Product of the first matrix with m columns (batched: three times as many), column after column.
    std::vector<float> multiply(int64_t m, Columns columns, int threads, bool reference) {
        Graph graph(*this, m, columns, 1);
        set_up(threads, reference);
        graph.compute();
        std::vector<float> out(ggml_nelements(graph.results[0]));
        ggml_backend_tensor_get(graph.results[0], out.data(), 0, out.size()*sizeof(float));
        return out;
    }

    // Seconds of one product, the best of some rounds. Each round goes over `matrices` of the copies, one after another.
    double time(int64_t m, int threads, int matrices, int rounds) {
        Graph graph(*this, m, Columns::dense, std::min<int>(matrices, (int) weights.size()));
        set_up(threads, false);
        graph.compute();
        double best = std::numeric_limits<double>::infinity();
        for (int i = 0; i < rounds; ++i) {
            const auto start = std::chrono::steady_clock::now();
            graph.compute();
            const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
            best = std::min(best, took.count()/graph.results.size());
        }
        return best;
    }

private:
    struct Graph {
        Products & of;
        ggml_context_ptr ctx;
        ggml_backend_buffer_ptr buffer;
        ggml_cgraph * graph;
        std::vector<ggml_tensor *> results;

        Graph(Products & of, int64_t m, Columns columns, int matrices) : of(of) {
            if (m < 1 || matrices < 1) {
                throw std::invalid_argument("a product needs a matrix and a column");
            }
            const ggml_init_params params = { ggml_tensor_overhead()*(4 + matrices) + ggml_graph_overhead_custom(matrices + 4, false), nullptr, true };
            ctx.reset(ggml_init(params));
            const int64_t gap   = columns == Columns::strided ? 32 : 0;
            const int64_t depth = columns == Columns::batched ? 3 : 1;
            ggml_tensor * whole = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, of.k + gap, m, depth);
            ggml_tensor * x     = gap == 0 ? whole : ggml_view_3d(ctx.get(), whole, of.k, m, depth, whole->nb[1], whole->nb[2], 0);
            graph = ggml_new_graph_custom(ctx.get(), matrices + 4, false);
            for (int i = 0; i < matrices; ++i) {
                results.push_back(ggml_mul_mat(ctx.get(), of.weights[i], x));
                ggml_build_forward_expand(graph, results.back());
            }
            buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_dev_buffer_type(cpu_device())));
            if (!buffer) {
                throw std::runtime_error("no memory for the columns to try");
            }
            // what nobody writes, and what lies between the columns, is not a number
            memset(ggml_backend_buffer_get_base(buffer.get()), 0xFF, ggml_backend_buffer_get_size(buffer.get()));
            Noise noise(7);
            std::vector<float> row(of.k);
            for (int64_t i = 0; i < m*depth; ++i) {
                for (float & value : row) {
                    value = noise.next();
                }
                ggml_backend_tensor_set(whole, row.data(), i*whole->nb[1], row.size()*sizeof(float));
            }
        }

        void compute() {
            if (ggml_backend_graph_compute(of.backend.get(), graph) != GGML_STATUS_SUCCESS) {
                throw std::runtime_error("the products were not computed");
            }
        }
    };

    // llama.cpp keeps columns in the other types, or numbers of things, and ends the process when asked to quantise to them.
    static bool is_weights(ggml_type type) {
        return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 ||
            (ggml_is_quantized(type) && type != GGML_TYPE_Q8_1 && type != GGML_TYPE_Q8_K);
    }

    // As the loader of models asks: with weights in an empty buffer of that kind.
    bool fits(ggml_backend_buffer_type_t buft) const {
        const ggml_init_params params = { 3*ggml_tensor_overhead(), nullptr, true };
        ggml_context_ptr scratch(ggml_init(params));
        ggml_backend_buffer_ptr empty(ggml_backend_buft_alloc_buffer(buft, 0));
        ggml_tensor * w = ggml_new_tensor_2d(scratch.get(), type, k, n);
        w->buffer = empty.get();
        ggml_tensor * x = ggml_new_tensor_2d(scratch.get(), GGML_TYPE_F32, k, 512);
        return ggml_backend_dev_supports_op(cpu_device(), ggml_mul_mat(scratch.get(), w, x));
    }

    // Quantising is slow for some types, so that rows come again after a number of them that fits no tile.
    std::vector<uint8_t> quantized() {
        const int64_t rows = std::min<int64_t>(n, 101);
        std::vector<float> values(rows*k);
        Noise noise(11);
        for (float & value : values) {
            value = 0.02f*noise.next();
        }
        const std::vector<float> importance(k, 1.0f);
        const size_t row_size = ggml_row_size(type, k);
        std::vector<uint8_t> data(row_size*n);
        ggml_quantize_init(type);
        ggml_quantize_chunk(type, values.data(), data.data(), 0, rows, k, ggml_quantize_requires_imatrix(type) ? importance.data() : nullptr);
        for (int64_t row = rows; row < n; ++row) {
            memcpy(data.data() + row*row_size, data.data() + (row % rows)*row_size, row_size);
        }
        return data;
    }

    void set_up(int threads, bool reference) {
        cpu_function<ggml_backend_set_n_threads_t>("ggml_backend_set_n_threads")(backend.get(), threads);
        cpu_function<void (*)(ggml_backend_t, bool)>("ggml_backend_cpu_set_use_ref")(backend.get(), reference);
    }

    ggml_type type;
    int64_t k;
    int64_t n;
    ggml_backend_ptr backend;
    ggml_context_ptr ctx;
    ggml_backend_buffer_ptr buffer;
    std::vector<ggml_tensor *> weights;
};

// Attention of some tokens to cells of half floats, in heads of 64 values of which four share keys and values.
struct Attention {
    int64_t cells;
    int64_t tokens;

    // `reference`: by the reference computations. `seconds`, where it is not null: the best of some rounds.
    std::vector<float> compute(int threads, bool reference, double * seconds) const {
        ggml_backend_ptr backend(ggml_backend_dev_init(cpu_device(), nullptr));
        const ggml_init_params params = { 8*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
        ggml_context_ptr ctx(ggml_init(params));
        ggml_tensor * q    = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, 64, tokens, 8);
        ggml_tensor * k    = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F16, 64, cells, 2);
        ggml_tensor * v    = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F16, 64, cells, 2);
        ggml_tensor * mask = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, cells, tokens);
        ggml_tensor * out  = ggml_flash_attn_ext(ctx.get(), q, k, v, mask, 0.125f, 0.0f, 0.0f);
        ggml_cgraph * graph = ggml_new_graph(ctx.get());
        ggml_build_forward_expand(graph, out);
        ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), ggml_backend_dev_buffer_type(cpu_device())));
        if (!backend || !buffer) {
            throw std::runtime_error("no memory for the attention to try");
        }
        memset(ggml_backend_buffer_get_base(buffer.get()), 0xFF, ggml_backend_buffer_get_size(buffer.get()));
        Noise noise(3);
        fill(q, noise);
        fill(k, noise);
        fill(v, noise);
        // every seventh cell is hidden
        std::vector<ggml_fp16_t> hidden(cells*tokens);
        for (size_t i = 0; i < hidden.size(); ++i) {
            hidden[i] = ggml_fp32_to_fp16(i % 7 == 3 ? -INFINITY : 0.0f);
        }
        ggml_backend_tensor_set(mask, hidden.data(), 0, hidden.size()*sizeof(ggml_fp16_t));
        cpu_function<ggml_backend_set_n_threads_t>("ggml_backend_set_n_threads")(backend.get(), threads);
        cpu_function<void (*)(ggml_backend_t, bool)>("ggml_backend_cpu_set_use_ref")(backend.get(), reference);
        for (int i = 0; i < (seconds != nullptr ? 20 : 1); ++i) {
            const auto start = std::chrono::steady_clock::now();
            if (ggml_backend_graph_compute(backend.get(), graph) != GGML_STATUS_SUCCESS) {
                throw std::runtime_error("the attention was not computed");
            }
            const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
            if (seconds != nullptr && (i == 0 || took.count() < *seconds)) {
                *seconds = took.count();
            }
        }
        std::vector<float> res(ggml_nelements(out));
        ggml_backend_tensor_get(out, res.data(), 0, res.size()*sizeof(float));
        return res;
    }

private:
    static void fill(ggml_tensor * tensor, Noise & noise) {
        std::vector<float> values(ggml_nelements(tensor));
        for (float & value : values) {
            value = noise.next();
        }
        if (tensor->type == GGML_TYPE_F32) {
            ggml_backend_tensor_set(tensor, values.data(), 0, values.size()*sizeof(float));
            return;
        }
        std::vector<ggml_fp16_t> halves(values.size());
        ggml_fp32_to_fp16_row(values.data(), halves.data(), (int64_t) values.size());
        ggml_backend_tensor_set(tensor, halves.data(), 0, halves.size()*sizeof(ggml_fp16_t));
    }
};

} // namespace mullama
