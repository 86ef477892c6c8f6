// Products by llama.cpp's AMX code (vendor/patches, *-amx-*), on memory that holds rubbish. With GGML_AMX_EMULATED tiles are
// software, so that any x86 with AVX-512 runs this; without it the processor needs AMX.
//
//   amx_products products TYPE     all shapes of a weight type: right, the same with 1 and 2 threads and for any number of columns
//   amx_products configuration     the tile configuration that arrives is the one that was meant
//   amx_products shared            another library uses tiles in between
//   amx_products denied            a thread gets no tiles (in software only)
//   amx_products full              the system starts no more threads while weights are loaded
//   amx_products refused           what it cannot compute is not promised
//
// Ends with status 0 and one line of figures, or with status 1 and what was wrong.

#include "amx/amx.h"
#include "amx/common.h"
#include "amx/mmq.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "ggml-cpu/traits.h"

#include <dlfcn.h>
#include <immintrin.h>
#include <pthread.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdarg>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#if defined(GGML_AMX_EMULATED)
#include "amx/emulated.h"
#endif

// Threads of these tests meet here; the real one belongs to a thread pool of ggml.
static pthread_barrier_t * barrier;
extern "C" void ggml_barrier(struct ggml_threadpool *) {
    if (barrier) {
        pthread_barrier_wait(barrier);
    }
}

// The system starts no more threads while this is set.
static bool is_full;
extern "C" int pthread_create(pthread_t * thread, const pthread_attr_t * attributes, void * (*start)(void *), void * argument) {
    static const auto real = (decltype(&pthread_create)) dlsym(RTLD_NEXT, "pthread_create");
    return is_full ? EAGAIN : real(thread, attributes, start, argument);
}

namespace {

constexpr uint8_t RUBBISH = 0xA5;
constexpr size_t MARGIN = 1024;

[[noreturn]] void wrong(const char * format, ...) {
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    putchar('\n');
    exit(1);
}

struct Shape {
    int64_t k, n;           // of the weights
    int64_t m;              // columns
    int64_t b2 = 1, b3 = 1; // batches of columns
    int64_t w2 = 1, w3 = 1; // matrices of weights
    int64_t apart = 0;      // floats between columns
    int64_t first = 0;      // the weights are a view that begins at this row

    std::string text() const {
        char line[200];
        snprintf(line, sizeof(line), "K=%d N=%d M=%d, batches %dx%d, matrices %dx%d, %d floats apart, from row %d", int(k), int(n),
                 int(m), int(b2), int(b3), int(w2), int(w3), int(apart), int(first));
        return line;
    }
};

std::vector<float> random_floats(size_t n, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(n);
    for (float & v : values) {
        v = normal(random);
    }
    return values;
}

// Random weights as ggml quantizes them. Kept, because some types take long.
const std::vector<uint8_t> & quantized(ggml_type type, int64_t rows, int64_t k) {
    static std::map<std::tuple<int, int64_t, int64_t>, std::vector<uint8_t>> made;
    std::vector<uint8_t> & found = made[{ type, rows, k }];
    if (found.empty()) {
        found.resize(rows * ggml_row_size(type, k));
        ggml_quantize_chunk(type, random_floats(rows * k, 7 + type).data(), found.data(), 0, rows, k, nullptr);
    }
    return found;
}

// One product: its tensors lie among rubbish.
struct Product {
    ggml_type type;
    Shape shape;
    ggml_context * context;
    ggml_backend_buffer_t buffer;
    ggml_tensor *whole, *weights, *columns, *results;
    std::vector<uint8_t> plain;   // the weights as ggml quantized them
    std::vector<float> in, out;
    size_t guarded;               // bytes of the weights' buffer that are theirs

    Product(ggml_type type, Shape s) : type(type), shape(s) {
        context = ggml_init({ 1 << 16, nullptr, true });
        whole = ggml_new_tensor_4d(context, type, s.k, s.n + s.first, s.w2, s.w3);
        ggml_backend_buffer_type_t kind = ggml_backend_amx_buffer_type();
        guarded = ggml_backend_buft_get_alloc_size(kind, whole);
        buffer = ggml_backend_buft_alloc_buffer(kind, guarded + MARGIN);
        ggml_backend_buffer_clear(buffer, RUBBISH);
        ggml_backend_tensor_alloc(buffer, whole, ggml_backend_buffer_get_base(buffer));

        plain = quantized(type, ggml_nrows(whole), s.k);
        ggml_backend_tensor_set(whole, plain.data(), 0, plain.size());

        weights = whole;
        if (s.first) {
            weights = ggml_view_2d(context, whole, s.k, s.n, whole->nb[1], s.first * whole->nb[1]);
            ggml_backend_view_init(weights);
        }

        const int64_t stride = s.k + s.apart;
        in = random_floats(stride * s.m * s.b2 * s.b3, 3);
        ggml_tensor * all = ggml_new_tensor_4d(context, GGML_TYPE_F32, stride, s.m, s.b2, s.b3);
        all->data = in.data();
        columns = ggml_view_4d(context, all, s.k, s.m, s.b2, s.b3, all->nb[1], all->nb[2], all->nb[3], 0);
        results = ggml_mul_mat(context, weights, columns);
    }

    ~Product() {
        ggml_backend_buffer_free(buffer);
        ggml_free(context);
    }

    ggml::cpu::extra_buffer_type * kind() const { return (ggml::cpu::extra_buffer_type *) buffer->buft->context; }

    std::vector<float> compute(int threads) {
        if (!kind()->supports_op(nullptr, results)) {
            wrong("%s: not supported: %s", ggml_type_name(type), shape.text().c_str());
        }
        auto * traits = (ggml::cpu::tensor_traits *) weights->extra;
        size_t size = 0;
        traits->work_size(threads, results, size);
        std::vector<uint8_t> work(size + MARGIN, RUBBISH);

        const size_t n = ggml_nelements(results);
        std::vector<float> raw(n + 2 * MARGIN);
        memset(raw.data(), 0xFF, raw.size() * sizeof(float)); // NaN
        results->data = raw.data() + MARGIN;

        pthread_barrier_t meeting;
        pthread_barrier_init(&meeting, nullptr, threads);
        barrier = threads > 1 ? &meeting : nullptr;
        std::vector<std::thread> others;
        auto part = [&](int i) {
            ggml_compute_params params = { i, threads, size, work.data(), nullptr, false };
            traits->compute_forward(&params, results);
        };
        for (int i = 1; i < threads; ++i) {
            others.emplace_back(part, i);
        }
        part(0);
        for (auto & thread : others) {
            thread.join();
        }
        barrier = nullptr;
        pthread_barrier_destroy(&meeting);

        for (size_t i = 0; i < MARGIN; ++i) {
            uint32_t before, after;
            memcpy(&before, &raw[i], 4);
            memcpy(&after, &raw[MARGIN + n + i], 4);
            if (before != 0xFFFFFFFF || after != 0xFFFFFFFF) {
                wrong("%s: results beside their place: %s", ggml_type_name(type), shape.text().c_str());
            }
            if (work[size + i] != RUBBISH) {
                wrong("%s: more work memory used than asked for: %s", ggml_type_name(type), shape.text().c_str());
            }
            if (((uint8_t *) ggml_backend_buffer_get_base(buffer))[guarded + i] != RUBBISH) {
                wrong("%s: weights beside their place: %s", ggml_type_name(type), shape.text().c_str());
            }
        }
        return std::vector<float>(raw.begin() + MARGIN, raw.begin() + MARGIN + n);
    }

    // The same products one row by one column, as ggml computes them without AMX; scales[i] is the sum of their magnitudes.
    std::vector<float> reference(std::vector<float> & scales) const {
        const auto * traits = ggml_get_type_traits_cpu(type);
        const auto * column_traits = ggml_get_type_traits_cpu(traits->vec_dot_type);
        const size_t row_size = ggml_row_size(type, shape.k);
        std::vector<uint8_t> column(ggml_row_size(traits->vec_dot_type, shape.k));
        std::vector<float> unpacked(ggml_nelements(whole)), made;
        ggml_get_type_traits(type)->to_float(plain.data(), unpacked.data(), unpacked.size());
        const int64_t stride = shape.k + shape.apart;
        for (int64_t i3 = 0; i3 < shape.b3; ++i3) {
            for (int64_t i2 = 0; i2 < shape.b2; ++i2) {
                const int64_t matrix = i3 / (shape.b3 / shape.w3) * shape.w2 + i2 / (shape.b2 / shape.w2);
                for (int64_t c = 0; c < shape.m; ++c) {
                    const float * x = in.data() + ((i3 * shape.b2 + i2) * shape.m + c) * stride;
                    if (type != GGML_TYPE_F16) {
                        column_traits->from_float(x, column.data(), shape.k);
                    }
                    for (int64_t r = 0; r < shape.n; ++r) {
                        const int64_t row = matrix * (shape.n + shape.first) + shape.first + r;
                        const float * w = unpacked.data() + row * shape.k;
                        double sum = 0, scale = 0;
                        for (int64_t k = 0; k < shape.k; ++k) {
                            sum += (double) w[k] * x[k];
                            scale += std::fabs((double) w[k] * x[k]);
                        }
                        float one = sum;
                        if (type != GGML_TYPE_F16) { // whose columns are not rounded here
                            traits->vec_dot(shape.k, &one, 0, plain.data() + row * row_size, 0, column.data(), 0, 1);
                        }
                        made.push_back(one);
                        scales.push_back(scale);
                    }
                }
            }
        }
        return made;
    }
};

bool same(const float * a, const float * b, size_t n) {
    return memcmp(a, b, n * sizeof(float)) == 0;
}

int products(ggml_type type) {
    const int64_t step = ggml_blck_size(type) == 256 ? 256 : 32;
    std::vector<Shape> shapes;
    for (int64_t blocks : { 1, 2, 5 }) {
        for (int64_t n : { 32, 64, 96, 224 }) {
            for (int64_t m : { 1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64 }) {
                if (blocks == 2 || n == 96 || m % 16 == 0) {
                    shapes.push_back({ blocks * step, n, m });
                }
            }
        }
    }
    if (step == 32) {
        shapes.push_back({ 32 * 18, 64, 33 });
    }
    for (int64_t m : { 1, 3, 32, 40 }) {
        shapes.push_back({ 2 * step, 64, m, 3 });                         // one matrix for several sequences
        shapes.push_back({ step, 64, m, 2, 2 });
        shapes.push_back({ 2 * step, 64, m, 3, 1, 3 });                   // a matrix for each
        shapes.push_back({ 2 * step, 32, m, 6, 2, 3, 2 });                // a matrix for every two
        shapes.push_back({ 2 * step, 96, m, 1, 1, 1, 1, 64 });            // columns of a larger result
        shapes.push_back({ step, 96, m, 3, 1, 1, 1, 32 });
        shapes.push_back({ 2 * step, 64, m, 2, 1, 2, 1, 16 });
        shapes.push_back({ 2 * step, 64, m, 1, 1, 1, 1, 0, 48 });         // some rows of the weights
    }

    size_t sums = 0, equal = 0;
    double furthest = 0;
    for (const Shape & shape : shapes) {
        Product product(type, shape);
        const std::vector<float> once = product.compute(1);
        for (int threads : { 1, 2, 3 }) {
            const std::vector<float> again = product.compute(threads);
            if (!same(once.data(), again.data(), once.size())) {
                wrong("%s: %d threads differ from one: %s", ggml_type_name(type), threads, shape.text().c_str());
            }
        }
        std::vector<float> scales;
        const std::vector<float> expected = product.reference(scales);
        for (size_t i = 0; i < once.size(); ++i) {
            const double off = std::fabs((double) once[i] - expected[i]) / scales[i];
            if (!(off < 1e-5)) {
                wrong("%s: result %zu is %g instead of %g: %s", ggml_type_name(type), i, once[i], expected[i],
                      shape.text().c_str());
            }
            furthest = std::max(furthest, off);
            equal += once[i] == expected[i];
        }
        sums += once.size();

        // each column by itself
        const Shape & s = shape;
        if (s.b2 * s.b3 == 1 && s.apart == 0 && s.first == 0) {
            Product single(type, { s.k, s.n, 1 });
            for (int64_t c = 0; c < s.m; ++c) {
                memcpy(single.in.data(), product.in.data() + c * s.k, s.k * sizeof(float));
                const std::vector<float> alone = single.compute(1 + c % 2);
                if (!same(alone.data(), once.data() + c * s.n, s.n)) {
                    wrong("%s: column %d of %d differs from itself alone: %s", ggml_type_name(type), int(c), int(s.m),
                          s.text().c_str());
                }
            }
        }
    }
    printf("%s: %zu shapes, %zu results, furthest %.1e, equal to the plain product: %.1f %%\n", ggml_type_name(type),
           shapes.size(), sums, furthest, 100.0 * equal / sums);
    return 0;
}

int configuration() {
    Product product(GGML_TYPE_Q8_0, { 64, 64, 33 });
    product.compute(1);
    alignas(64) uint8_t found[64] = {};
    _tile_storeconfig(found);
    __asm__ volatile("" : : "r"(found) : "memory"); // older compilers believe that 8 bytes of it were written
    const uint8_t columns[8] = { 64, 64, 32, 32, 64, 64, 64, 64 }, rows[8] = { 8, 8, 16, 16, 16, 16, 16, 16 };
    uint8_t meant[64] = { 1 };
    for (int t = 0; t < 8; ++t) {
        meant[16 + 2 * t] = columns[t];
        meant[48 + t] = rows[t];
    }
    for (int i = 0; i < 64; ++i) {
        if (found[i] != meant[i]) {
            wrong("byte %d of the configuration is %d instead of %d", i, found[i], meant[i]);
        }
    }
    puts("the configuration is whole");
    return 0;
}

int shared() {
    Product product(GGML_TYPE_Q4_0, { 96, 64, 40 });
    const std::vector<float> before = product.compute(1);
    _tile_release();
    if (product.compute(1) != before) {
        wrong("the product differs after another library gave the tiles back");
    }
    alignas(64) static const uint8_t other[64] = { 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0,
                                                   4, 0, 4, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1,
                                                   1, 1, 1, 1 };
    _tile_loadconfig(other);
    if (product.compute(1) != before) {
        wrong("the product differs after another library configured tiles");
    }
    puts("tiles are configured for each product");
    return 0;
}

#if defined(GGML_AMX_EMULATED)
int denied() {
    for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K,
                            GGML_TYPE_IQ4_XS }) {
        Product product(type, { 512, 96, 50 });
        amx_emulated::denied() = false;
        const std::vector<float> tiles = product.compute(1);
        std::vector<float> columns;
        amx_emulated::denied() = true;
        std::thread([&] { columns = product.compute(2); }).join(); // new threads, which ask anew
        if (!same(tiles.data(), columns.data(), tiles.size())) {
            wrong("%s: a thread without tiles computes something else", ggml_type_name(type));
        }
    }
    puts("threads without tiles compute the same");
    return 0;
}
#endif

int full() {
    const Shape shape = { 512, 96, 50 };
    const std::vector<float> before = Product(GGML_TYPE_Q8_0, shape).compute(1);
    is_full = true;
    Product product(GGML_TYPE_Q8_0, shape);
    const std::vector<float> now = product.compute(1);
    if (!same(before.data(), now.data(), now.size())) {
        wrong("weights that were packed without further threads differ");
    }
    puts("weights are packed without further threads");
    return 0;
}

int refused() {
    auto supported = [](ggml_type type, Shape shape) {
        Product product(type, shape);
        return product.kind()->supports_op(nullptr, product.results);
    };
    if (supported(GGML_TYPE_Q8_0, { 64, 48, 1 }) || supported(GGML_TYPE_Q4_K, { 256, 16, 1 })) {
        wrong("rows that do not fill two tiles");
    }
    if (supported(GGML_TYPE_Q5_0, { 64, 64, 1 }) || supported(GGML_TYPE_F32, { 64, 64, 1 })) {
        wrong("a type without tiles");
    }
    Product product(GGML_TYPE_Q8_0, { 64, 64, 4 });
    ggml_tensor * turned = ggml_transpose(product.context, ggml_new_tensor_2d(product.context, GGML_TYPE_F32, 4, 64));
    ggml_tensor * result = ggml_mul_mat(product.context, product.weights, turned);
    if (product.kind()->supports_op(nullptr, result)) {
        wrong("columns whose values lie apart");
    }
    puts("what cannot be computed is refused");
    return 0;
}

}  // namespace

int main(int argc, char ** argv) {
    ggml_cpu_init();
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    const std::string mode = argc > 1 ? argv[1] : "";
    if (mode == "products" && argc > 2) {
        for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
            if (std::string(argv[2]) == ggml_type_name((ggml_type) type)) {
                return products((ggml_type) type);
            }
        }
    }
    if (mode == "configuration") { return configuration(); }
    if (mode == "shared")        { return shared(); }
#if defined(GGML_AMX_EMULATED)
    if (mode == "denied")        { return denied(); }
#endif
    if (mode == "full")          { return full(); }
    if (mode == "refused")       { return refused(); }
    wrong("what is to be tested?");
}
