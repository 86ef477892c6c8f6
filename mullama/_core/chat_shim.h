// A thin shim over llama.cpp's common_chat_*: its types never reach Cython.
#pragma once

#include "llama.h"

#include <memory>
#include <string>

namespace mullama {

class ChatTemplate {
  public:
    // Throws std::runtime_error when the template does not parse. An empty override takes the model's own
    // template, and ChatML when it has none.
    ChatTemplate(const llama_model * model, const std::string & override_source);
    ~ChatTemplate();

    // Render OpenAI messages (a JSON array). Throws std::runtime_error when the template refuses them.
    // A leading BOS is left out where the vocabulary adds one itself: tokenise with add_special.
    std::string apply(const std::string & messages_json, bool add_generation_prompt) const;

    std::string source() const;
    bool is_explicit() const; // false: the model has none and ChatML is used

  private:
    struct Impl;
    std::unique_ptr<Impl> impl;
};

} // namespace mullama
