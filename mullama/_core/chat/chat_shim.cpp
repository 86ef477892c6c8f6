#include "chat_shim.h"

#include "answer_format.h"

#include "chat.h"
#include "chat-peg-parser.h"
#include "json-schema-to-grammar.h"
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

// Run `work`, which may throw anything. False, with the reason in `error`.
template <typename Work> static bool guarded(std::string & error, Work work) noexcept {
    try {
        work();
        return true;
    } catch (const std::exception & e) {
        error = e.what();
    } catch (...) {
        error = "unknown C++ exception";
    }
    return false;
}

bool ChatTemplate::apply(const std::string & messages_json, bool add_generation_prompt, std::string & prompt,
                         std::string & error) const noexcept {
    return guarded(error, [&] {
        if (too_deep(messages_json)) throw std::runtime_error("they are nested too deeply");
        common_chat_templates_inputs inputs;
        inputs.messages = common_chat_msgs_parse_oaicompat(common_json::parse(messages_json));
        inputs.add_generation_prompt = add_generation_prompt;
        inputs.use_jinja = !impl->is_named;
        // The prompt alone is wanted: skip the analysis of tool-call formats.
        inputs.force_pure_content = true;
        prompt = common_chat_templates_apply(impl->templates.get(), inputs).prompt;
    });
}

// While it lives, this thread's parsers are built without grammars, and with `parameters` in place of the functions' own.
class BuiltWith {
  public:
    explicit BuiltWith(const std::map<std::string, common_json> & parameters) {
        common_grammar_set_wanted(false);
        common_chat_set_tool_parameters(&parameters);
    }
    ~BuiltWith() {
        common_chat_set_tool_parameters(nullptr);
        common_grammar_set_wanted(true);
    }
    BuiltWith(const BuiltWith &) = delete;
    BuiltWith & operator=(const BuiltWith &) = delete;
};

// Calls in the form that most models write when a prompt shows them how, whatever their template knows.
static common_peg_arena generic_parser(const common_chat_params & params, const common_json & tools, const ChatAsk & ask) {
    return build_chat_peg_parser([&](common_chat_peg_builder & p) {
        auto reasoning = p.eps();
        if (ask.splits && params.supports_thinking && !params.thinking_end_tags.empty()) {
            const auto & end = params.thinking_end_tags.front();
            reasoning = p.optional(p.optspace(params.thinking_start_tag) + p.reasoning(p.until(end)) + p.optspace(end));
        }
        // Each call has marks of its own.
        const auto call = p.standard_json_tools("<tool_call>", "</tool_call>", tools, false, true) + p.space();
        auto calls = ask.parallel ? p.one_or_more(call) : call;
        if (!ask.must_call) calls = p.optional(calls);
        return p.prefix(params.generation_prompt, params.thinking_start_tag)
               << reasoning + p.content(p.until("<tool_call>")) + calls + p.end();
    });
}

bool ChatTemplate::open(const ChatAsk & ask, ChatOpened & opened, std::string & error) const noexcept {
    return guarded(error, [&] {
        for (const auto * json : { &ask.messages, &ask.tools, &ask.parameters, &ask.arguments }) {
            if (too_deep(*json)) throw std::runtime_error("they are nested too deeply");
        }
        common_chat_templates_inputs inputs;
        inputs.messages = common_chat_msgs_parse_oaicompat(common_json::parse(ask.messages));
        inputs.add_generation_prompt = ask.add_generation_prompt;
        inputs.use_jinja = !impl->is_named;
        inputs.enable_thinking = ask.thinks;
        inputs.reasoning_format = ask.splits ? COMMON_REASONING_FORMAT_AUTO : COMMON_REASONING_FORMAT_NONE;
        inputs.parallel_tool_calls = ask.parallel;
        inputs.tool_choice = !ask.may_call  ? COMMON_CHAT_TOOL_CHOICE_NONE
                             : ask.must_call ? COMMON_CHAT_TOOL_CHOICE_REQUIRED
                                             : COMMON_CHAT_TOOL_CHOICE_AUTO;
        std::map<std::string, common_json> parameters;
        common_json tools = common_json::array();
        if (!ask.tools.empty()) {
            tools = common_json::parse(ask.tools);
            const auto given = common_json::parse(ask.parameters); // items() only looks at it
            for (const auto & [name, value] : given.items()) parameters[name] = value;
            if (!ask.is_generic) inputs.tools = common_chat_tools_parse_oaicompat(tools);
        }
        if (!ask.arguments.empty()) {
            const auto given = common_json::parse(ask.arguments);
            for (const auto & [name, value] : given.items()) {
                inputs.chat_template_kwargs[name] = value.dump();
            }
        }
        const BuiltWith built(parameters);
        auto params = common_chat_templates_apply(impl->templates.get(), inputs);
        auto format = std::make_shared<AnswerFormat>();
        const bool has_calls = ask.is_generic && ask.may_call && !tools.empty();
        format->form = params.format;
        format->prefix = inputs.use_jinja ? params.generation_prompt : "";
        format->parser = has_calls ? generic_parser(params, tools, ask) : std::move(params.parser);
        format->find_delimiters();
        common_json facts = {
            { "stops", params.additional_stops },
            { "shown", params.preserved_tokens },
            { "thinking_start", params.thinking_start_tag },
            { "thinking_ends", params.thinking_end_tags },
            { "supports_thinking", params.supports_thinking },
            { "generation_prompt", params.generation_prompt },
        };
        opened.facts = facts.dump();
        opened.prompt = std::move(params.prompt);
        opened.format = std::move(format);
    });
}

std::map<std::string, bool> ChatTemplate::caps() const { return common_chat_templates_get_caps(impl->templates.get()); }

std::string ChatTemplate::source() const { return common_chat_templates_source(impl->templates.get()); }

bool ChatTemplate::is_explicit() const { return common_chat_templates_was_explicit(impl->templates.get()); }

} // namespace mullama
