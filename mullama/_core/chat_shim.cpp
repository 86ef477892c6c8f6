#include "chat_shim.h"

#include "chat.h"
#include "log.h"

namespace mullama {

struct ChatTemplate::Impl {
    common_chat_templates_ptr templates;
};

ChatTemplate::ChatTemplate(const llama_model * model, const std::string & override_source) {
    common_log_set_verbosity_thold(LOG_LEVEL_OUTPUT); // errors come as exceptions, warnings would come per request
    impl = std::make_unique<Impl>();
    impl->templates = common_chat_templates_init(model, override_source);
}

ChatTemplate::~ChatTemplate() = default;

std::string ChatTemplate::apply(const std::string & messages_json, bool add_generation_prompt) const {
    common_chat_templates_inputs inputs;
    inputs.messages = common_chat_msgs_parse_oaicompat(common_json::parse(messages_json));
    inputs.add_generation_prompt = add_generation_prompt;
    inputs.use_jinja = true;
    // The prompt alone is wanted: skip the analysis of tool-call formats.
    inputs.force_pure_content = true;
    return common_chat_templates_apply(impl->templates.get(), inputs).prompt;
}

std::string ChatTemplate::source() const { return common_chat_templates_source(impl->templates.get()); }

bool ChatTemplate::is_explicit() const { return common_chat_templates_was_explicit(impl->templates.get()); }

} // namespace mullama
