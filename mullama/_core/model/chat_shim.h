// A thin shim over llama.cpp's common_chat_*: its types never reach Cython.
#pragma once

#include "llama.h"

#include <memory>
#include <string>
#include <vector>

namespace mullama {

// What llama.cpp has templates of by name.
std::vector<std::string> chat_template_names();

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

    std::string source() const;
    bool is_explicit() const; // false: the model has none and ChatML is used

  private:
    struct Impl;
    std::unique_ptr<Impl> impl;
};

} // namespace mullama
