// Reads a model's answer while it is written: thoughts, content and calls of functions, as the chat's template has them.
//
// llama.cpp's parsers read a whole text. An answer that grows by a token would be read again with each, which costs the
// square of its length; so a parse is made only where something may change. Between them the answer is in a *run*: a
// stretch of thoughts, of content, or of a text in a call's arguments, which goes on until a text comes that ends it:
//
//     <think>Let me see ... </think>\n<tool_call>\n{"name": "find", "arguments": {"text": "a long ... "}}\n</tool_call>
//            |--- run ----|                                                       |-- run --|
//
// What was told is never taken back, and does not depend on the pieces in which the answer came: an answer that is given
// as one piece is told the same. Where an answer cannot be read any further, the rest of it is content.
#pragma once

#include <memory>
#include <string>
#include <vector>

namespace mullama {

struct AnswerFormat; // answer_format.h

// What is new in an answer.
struct AnswerDelta {
    enum Kind { REASONING, CONTENT, CALL, ARGUMENTS };

    int kind;
    int index;        // of the call
    std::string text; // of a CALL: the function's name
    std::string id;   // of a CALL, where the model gives one
};

class AnswerParser {
  public:
    explicit AnswerParser(std::shared_ptr<const AnswerFormat> format);
    ~AnswerParser();

    // Take the next piece (whole UTF-8 characters) and add what is new to `out`. What fails makes the rest content.
    void feed(const std::string & piece, std::vector<AnswerDelta> & out) noexcept;

    // The answer has ended: add what had been held back.
    void finish(std::vector<AnswerDelta> & out) noexcept;

    // Bytes that the next feed or finish may have to read again.
    size_t size() const noexcept;

    // How often a parse contradicted what had been told; for tests.
    int contradictions() const noexcept;

  private:
    struct Impl;
    std::unique_ptr<Impl> impl;
};

} // namespace mullama
