// A thin shim over llama.cpp's common_chat_*: its types never reach Cython.
#pragma once

#include "llama.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

namespace mullama {

struct AnswerFormat; // answer_format.h

// What llama.cpp has templates of by name.
std::vector<std::string> chat_template_names();

// What is asked of a template. JSON texts where it says so; an empty one: nothing.
struct ChatAsk {
    std::string messages;   // array of OpenAI's messages
    std::string tools;      // array of functions, as the template shows them
    std::string parameters; // object: name of each function -> the parameters that calls of it are parsed with
    std::string arguments;  // object: further arguments of the template
    bool add_generation_prompt = true;
    bool thinks = true;       // the model may think before it answers, where the template leaves that open
    bool splits = true;       // thoughts are told apart from the content
    bool may_call = true;
    bool must_call = false;
    bool parallel = true;     // more than one call
    bool is_generic = false;  // the template knows no functions: calls are read in the generic form, <tool_call>JSON</tool_call>
};

struct ChatOpened {
    std::string prompt;
    std::shared_ptr<const AnswerFormat> format;
    // What whoever generates the answer has to know of its form; an object: `stops`, `shown` (texts of control tokens that
    // are part of the answer's text), `thinking_start`, `thinking_ends`, `supports_thinking`, `generation_prompt`.
    std::string facts;
};

class ChatTemplate {
  public:
    // Throws std::runtime_error when the template does not parse. An empty override takes the model's own
    // template, and ChatML when it has none; one of chat_template_names() is llama.cpp's own of that name.
    ChatTemplate(const llama_model * model, const std::string & override_source);
    ~ChatTemplate();

    // Render OpenAI messages (a JSON array). False, with the reason in `error` (any bytes), when they are refused.
    // A leading BOS is left out where the vocabulary adds one itself: tokenise with add_special.
    bool apply(const std::string & messages_json, bool add_generation_prompt, std::string & prompt,
               std::string & error) const noexcept;

    // The same with functions and thinking, and how the answer is to be read.
    bool open(const ChatAsk & ask, ChatOpened & opened, std::string & error) const noexcept;

    std::string source() const;
    bool is_explicit() const; // false: the model has none and ChatML is used
    std::map<std::string, bool> caps() const; // what the template can do, by llama.cpp's names

  private:
    struct Impl;
    std::unique_ptr<Impl> impl;
};

} // namespace mullama
