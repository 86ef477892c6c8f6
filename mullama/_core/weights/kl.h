// How far two rows of logits are apart.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace mullama {

// The Kullback-Leibler divergence D(p || q) in nats of the distributions that two rows of n logits stand for, and
// whether both have the same most likely token. False: a row holds NaN or +inf, or nothing but -inf,
// or the divergence is infinite.
inline bool kl_divergence(const float * p, const float * q, int32_t n, double & kl, bool & same_top) noexcept {
    const float inf = std::numeric_limits<float>::infinity();
    int32_t top_p = 0, top_q = 0;
    for (int32_t i = 0; i < n; ++i) {
        if (!(p[i] < inf) || !(q[i] < inf)) {
            return false;
        }
        top_p = p[i] > p[top_p] ? i : top_p;
        top_q = q[i] > q[top_q] ? i : top_q;
    }
    const double max_p = p[top_p], max_q = q[top_q];
    if (!(max_p > -inf) || !(max_q > -inf)) {
        return false;
    }
    double sum_p = 0, sum_q = 0;
    for (int32_t i = 0; i < n; ++i) {
        sum_p += std::exp(p[i] - max_p);
        sum_q += std::exp(q[i] - max_q);
    }
    const double log_p = max_p + std::log(sum_p), log_q = max_q + std::log(sum_q);
    double sum = 0;
    for (int32_t i = 0; i < n; ++i) {
        const double weight = std::exp(p[i] - log_p);
        if (weight > 0) {
            sum += weight * ((p[i] - log_p) - (q[i] - log_q));
        }
    }
    if (!(sum < std::numeric_limits<double>::infinity())) {
        return false; // q rules out what p may choose
    }
    kl = std::max(sum, 0.0); // rounding may leave equal rows a hair below
    same_top = top_p == top_q;
    return true;
}

} // namespace mullama
