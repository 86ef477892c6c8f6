// How the answers to a chat are written, for those that know llama.cpp's types.
#pragma once

#include "chat.h"

#include <string>
#include <vector>

namespace mullama {

struct AnswerFormat {
    common_chat_format form = COMMON_CHAT_FORMAT_CONTENT_ONLY;
    std::string prefix;                  // what the prompt holds of the answer already
    common_peg_arena parser;             // of prefix and answer; empty: all is content
    std::vector<std::string> delimiters; // texts that may end a run
    size_t longest = 0;                  // bytes of the longest one

    void find_delimiters();
};

} // namespace mullama
