// How the answers to a chat are written, for those that know llama.cpp's types.
#pragma once

#include "chat.h"

#include <algorithm>
#include <string>
#include <vector>

namespace mullama {

struct AnswerFormat {
    common_chat_format form = COMMON_CHAT_FORMAT_CONTENT_ONLY;
    std::string prefix;                  // what the prompt holds of the answer already
    common_peg_arena parser;             // of prefix and answer; empty: all is content
    std::vector<std::string> delimiters; // texts that may end a run
    size_t longest = 0;                  // bytes of the longest one

    // Of the parser.
    void find_delimiters() {
        for (size_t id = 0; id < parser.size(); ++id) {
            if (const auto * until = std::get_if<common_peg_until_parser>(&parser.get(id))) {
                delimiters.insert(delimiters.end(), until->delimiters.begin(), until->delimiters.end());
            }
        }
        std::sort(delimiters.begin(), delimiters.end());
        delimiters.erase(std::unique(delimiters.begin(), delimiters.end()), delimiters.end());
        for (const auto & one : delimiters) longest = std::max(longest, one.size());
    }
};

} // namespace mullama
