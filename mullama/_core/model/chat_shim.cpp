#include "chat_shim.h"

#include "chat.h"
#include "log.h"

#include <algorithm>

namespace mullama {

struct ChatTemplate::Impl {
    common_chat_templates_ptr templates;
    bool is_named = false; // one of llama.cpp's own, which are code and no Jinja
};

std::vector<std::string> chat_template_names() {
    std::vector<const char *> names((size_t) llama_chat_builtin_templates(nullptr, 0));
    llama_chat_builtin_templates(names.data(), names.size());
    return { names.begin(), names.end() };
}

ChatTemplate::ChatTemplate(const llama_model * model, const std::string & override_source) {
    common_log_set_verbosity_thold(LOG_LEVEL_OUTPUT); // errors come as exceptions, warnings would come per request
    impl = std::make_unique<Impl>();
    impl->templates = common_chat_templates_init(model, override_source);
    const auto names = chat_template_names();
    // ChatML is there as Jinja too, which can do more.
    impl->is_named = override_source != "chatml" && std::find(names.begin(), names.end(), override_source) != names.end();
}

ChatTemplate::~ChatTemplate() = default;

// The JSON library recurses as deep as its input, and a stack overflow is no exception: look before parsing.
static bool too_deep(const std::string & json) {
    constexpr int deepest = 100;
    int depth = 0;
    bool in_string = false;
    for (size_t i = 0; i < json.size(); ++i) {
        const char c = json[i];
        if (in_string) {
            if (c == '\\') ++i;
            else if (c == '"') in_string = false;
        } else if (c == '"') {
            in_string = true;
        } else if (c == '[' || c == '{') {
            if (++depth > deepest) return true;
        } else if (c == ']' || c == '}') {
            --depth;
        }
    }
    return false;
}

bool ChatTemplate::apply(const std::string & messages_json, bool add_generation_prompt, std::string & prompt,
                         std::string & error) const noexcept {
    try {
        if (too_deep(messages_json)) {
            error = "they are nested too deeply";
            return false;
        }
        common_chat_templates_inputs inputs;
        inputs.messages = common_chat_msgs_parse_oaicompat(common_json::parse(messages_json));
        inputs.add_generation_prompt = add_generation_prompt;
        inputs.use_jinja = !impl->is_named;
        // The prompt alone is wanted: skip the analysis of tool-call formats.
        inputs.force_pure_content = true;
        prompt = common_chat_templates_apply(impl->templates.get(), inputs).prompt;
        return true;
    } catch (const std::exception & e) {
        error = e.what();
    } catch (...) {
        error = "unknown C++ exception";
    }
    return false;
}

std::string ChatTemplate::source() const { return common_chat_templates_source(impl->templates.get()); }

bool ChatTemplate::is_explicit() const { return common_chat_templates_was_explicit(impl->templates.get()); }

} // namespace mullama
