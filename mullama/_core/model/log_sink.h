// llama.cpp's log lines: errors are kept for the exception that follows, the rest is printed on request.
#pragma once

#include "llama.h"

#include <atomic>
#include <cstdio>
#include <mutex>
#include <string>

namespace mullama {

struct LogSink {
    std::mutex mutex;
    std::string errors; // since the last take_errors(), at most 2,000 characters
    std::atomic<int> print_level{GGML_LOG_LEVEL_NONE}; // print lines of this level and above; NONE: nothing

    int last_level = GGML_LOG_LEVEL_NONE;

    static LogSink & instance() {
        static LogSink sink;
        return sink;
    }

    static void receive(ggml_log_level level, const char * text, void * user) noexcept {
        auto & sink = *(LogSink *) user;
        try {
            const std::lock_guard<std::mutex> lock(sink.mutex);
            if (level == GGML_LOG_LEVEL_ERROR && sink.errors.size() < 2000) {
                sink.errors += text;
            }
            // A continuation (progress dots) has the level of what it continues.
            const int effective = level == GGML_LOG_LEVEL_CONT ? sink.last_level : (int) level;
            sink.last_level = effective;
            const int from = sink.print_level;
            if (from != GGML_LOG_LEVEL_NONE && effective >= from) {
                std::fputs(text, stderr);
            }
        } catch (...) {
            // a log line is not worth a crash
        }
    }

    static void install() { llama_log_set(receive, &instance()); }

    std::string take_errors() {
        const std::lock_guard<std::mutex> lock(mutex);
        std::string res;
        res.swap(errors);
        return res;
    }
};

} // namespace mullama
