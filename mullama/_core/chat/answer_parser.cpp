#include "answer_parser.h"

#include "answer_format.h"

#include "chat-peg-parser.h"

#include <algorithm>
#include <cctype>

namespace mullama {

using Tags = common_chat_peg_builder;

// Until so many bytes, each piece is parsed where there is no run; then pieces are gathered to a share of the text.
constexpr size_t SHARE = 64;

struct AnswerParser::Impl {
    enum class Run { NONE, REASONING, CONTENT, JSON_STRING, STRING_VALUE };
    struct Parse;

    explicit Impl(std::shared_ptr<const AnswerFormat> format);

    void feed(const std::string & piece, std::vector<AnswerDelta> & out);
    void finish(std::vector<AnswerDelta> & out);

    Parse parse(size_t size) const;
    void read(std::vector<AnswerDelta> & out);
    bool go_on(std::vector<AnswerDelta> & out);
    void tell(const Parse & parse, std::vector<AnswerDelta> & out);
    void tell(int kind, std::string told, std::vector<AnswerDelta> & out);
    void begin_run(const Parse & parse);
    bool may_end(size_t at) const;
    void give_up(size_t rest, std::vector<AnswerDelta> & out);

    std::shared_ptr<const AnswerFormat> format;
    std::string text;         // prefix and answer
    size_t parsed;            // bytes of it that the last parse read
    size_t told_to = 0;       // of a run: what comes before was told
    Run run = Run::NONE;
    bool broken = false;      // what comes is content
    common_chat_msg told;
    int n_contradictions = 0;
};

struct AnswerParser::Impl::Parse {
    enum Last { NOTHING, THOUGHTS, TEXT, CALL };

    bool ok = false;       // the text may be the beginning of an answer
    bool complete = false; // it may be a whole one
    size_t end = 0;        // what comes behind was not read
    size_t told_end = 0;   // where what was found ends
    Last last = NOTHING;   // what ends there
    size_t n_calls = 0;    // that have begun
    size_t before_call = 0; // where what was found before the latest of them ends
    common_chat_msg msg;
    // What is still open at the end of the text, and where it begins.
    std::string open_tag;
    size_t open_start = 0;
};

AnswerParser::Impl::Impl(std::shared_ptr<const AnswerFormat> format_)
    : format(std::move(format_)), text(format->prefix), parsed(text.size()), broken(format->parser.empty()) {
    if (!broken && !text.empty()) told = parse(text.size()).msg; // the prompt has it, and the answer has not
}

static bool is_space(char c) { return std::isspace((unsigned char) c) != 0; }

static bool is_blank(const std::string & text, size_t from) {
    return std::all_of(text.begin() + (std::ptrdiff_t) from, text.end(), is_space);
}

AnswerParser::Impl::Parse AnswerParser::Impl::parse(size_t size) const {
    Parse found;
    common_peg_parse_context ctx(text.substr(0, size), COMMON_PEG_PARSE_FLAG_LENIENT);
    common_peg_parse_result result;
    try {
        result = format->parser.parse(ctx);
    } catch (const std::runtime_error &) {
        return found; // nested too deeply
    }
    if (result.fail()) return found;
    found.ok = true;
    found.complete = result.success();
    found.end = result.end;
    found.told_end = format->prefix.size();
    found.msg.role = "assistant";
    std::unique_ptr<common_chat_peg_mapper> mapper;
    if (format->form == COMMON_CHAT_FORMAT_PEG_GEMMA4) {
        mapper = std::make_unique<common_chat_peg_gemma4_mapper>(found.msg);
    } else if (format->form == COMMON_CHAT_FORMAT_PEG_MINIMAX_M3) {
        mapper = std::make_unique<common_chat_peg_minimax_m3_mapper>(found.msg);
    } else {
        mapper = std::make_unique<common_chat_peg_mapper>(found.msg);
    }
    mapper->from_ast(ctx.ast, result);
    ctx.ast.visit(result, [&](const common_peg_ast_node & node) {
        if (node.tag == Tags::TOOL) {
            found.n_calls++;
            found.before_call = found.told_end;
        }
        if (node.tag.empty() || node.end < found.told_end) return;
        const bool is_thought = node.tag == Tags::REASONING;
        if (is_thought || node.tag == Tags::CONTENT) found.last = is_thought ? Parse::THOUGHTS : Parse::TEXT;
        else if (node.tag.compare(0, 4, "tool") == 0) found.last = Parse::CALL;
        else return;
        found.told_end = node.end;
        if (node.is_partial && node.end == size) {
            found.open_tag = node.tag; // the innermost one comes last
            found.open_start = node.start;
        }
    });
    return found;
}

void AnswerParser::Impl::tell(int kind, std::string news, std::vector<AnswerDelta> & out) {
    if (news.empty()) return;
    switch (kind) {
        case AnswerDelta::REASONING: {
            const bool is_first = is_blank(told.reasoning_content, 0);
            told.reasoning_content += news;
            if (is_first) news.erase(news.begin(), std::find_if_not(news.begin(), news.end(), is_space));
            if (news.empty()) return;
            break;
        }
        case AnswerDelta::CONTENT: told.content += news; break;
        default: told.tool_calls.back().arguments += news; break;
    }
    const int index = kind == AnswerDelta::ARGUMENTS ? (int) told.tool_calls.size() - 1 : 0;
    if (!out.empty() && out.back().kind == kind && out.back().index == index) out.back().text += news;
    else out.push_back({ kind, index, std::move(news), "" });
}

void AnswerParser::Impl::tell(const Parse & parse, std::vector<AnswerDelta> & out) {
    // What is new of a text; nothing where it is not what was told and more.
    const auto news = [this](const std::string & old, const std::string & now) {
        if (now.compare(0, old.size(), old) == 0) return now.substr(old.size());
        if (old.compare(0, now.size(), now) != 0) n_contradictions++;
        return std::string();
    };
    const auto & msg = parse.msg;
    tell(AnswerDelta::REASONING, news(told.reasoning_content, msg.reasoning_content), out);
    tell(AnswerDelta::CONTENT, news(told.content, msg.content), out);
    for (size_t i = 0; i < msg.tool_calls.size(); ++i) {
        const auto & call = msg.tool_calls[i];
        if (i == told.tool_calls.size()) {
            if (call.name.empty()) break;
            told.tool_calls.push_back(call);
            told.tool_calls.back().arguments.clear();
            out.push_back({ AnswerDelta::CALL, (int) i, call.name, call.id });
        }
        if (i + 1 == told.tool_calls.size()) {
            tell(AnswerDelta::ARGUMENTS, news(told.tool_calls[i].arguments, call.arguments), out);
        }
    }
}

void AnswerParser::Impl::begin_run(const Parse & parse) {
    run = Run::NONE;
    told_to = text.size();
    const bool is_native = format->form == COMMON_CHAT_FORMAT_PEG_NATIVE;
    if (parse.open_tag == Tags::REASONING) {
        // Thoughts of spaces alone are none, so nothing was told of them.
        if (!parse.msg.reasoning_content.empty() && parse.msg.reasoning_content == told.reasoning_content) run = Run::REASONING;
    } else if (parse.open_tag == Tags::CONTENT) {
        if (parse.msg.content == told.content) run = Run::CONTENT;
    } else if (is_native && parse.open_tag == Tags::TOOL_ARG_STRING_VALUE && !told.tool_calls.empty()) {
        run = Run::STRING_VALUE;
    } else if (is_native && parse.open_tag == Tags::TOOL_ARGS && !told.tool_calls.empty() && text[parse.open_start] == '{') {
        bool in_string = false;
        for (size_t i = parse.open_start; i < text.size(); ++i) {
            if (in_string && text[i] == '\\') ++i;
            else if (text[i] == '"') in_string = !in_string;
        }
        // Spaces at the end of arguments are told when something follows.
        while (told_to > parse.open_start && is_space(text[told_to - 1])) --told_to;
        if (in_string && told.tool_calls.size() == parse.msg.tool_calls.size()) run = Run::JSON_STRING;
    }
}

// Whether the text from `at` on is the beginning of a delimiter, and not all of it.
bool AnswerParser::Impl::may_end(size_t at) const {
    const size_t size = text.size() - at;
    return std::any_of(format->delimiters.begin(), format->delimiters.end(), [&](const std::string & one) {
        return one.size() > size && text.compare(at, size, one, 0, size) == 0;
    });
}

// Tell what a run surely holds. False: it has ended somewhere, which a parse will find.
bool AnswerParser::Impl::go_on(std::vector<AnswerDelta> & out) {
    size_t sure = text.size();
    if (run == Run::JSON_STRING) {
        for (size_t i = told_to; i < text.size(); ++i) {
            if (text[i] == '"') return false;
            if (text[i] != '\\') continue;
            const size_t size = i + 1 < text.size() && text[i + 1] == 'u' ? 6 : 2;
            if (i + size > text.size()) {
                sure = i;
                break;
            }
            static const std::string known = "\"\\/bfnrtu";
            if (known.find(text[i + 1]) == std::string::npos) return false;
            for (size_t at = i + 2; at < i + size; ++at) {
                if (!std::isxdigit((unsigned char) text[at])) return false;
            }
            i += size - 1;
        }
        while (sure > told_to && is_space(text[sure - 1])) --sure;
    } else {
        for (const auto & one : format->delimiters) {
            if (text.find(one, told_to) != std::string::npos) return false;
        }
        // The earliest place from which on the text may become a delimiter.
        sure = std::max(told_to, text.size() - std::min(text.size(), format->longest));
        while (sure < text.size() && !may_end(sure)) ++sure;
    }
    std::string news = text.substr(told_to, sure - told_to);
    told_to = sure;
    if (run == Run::STRING_VALUE && !news.empty()) {
        news = common_json(news).dump();
        news = news.substr(1, news.size() - 2);
    }
    const int kind = run == Run::REASONING ? AnswerDelta::REASONING : run == Run::CONTENT ? AnswerDelta::CONTENT : AnswerDelta::ARGUMENTS;
    tell(kind, std::move(news), out);
    return true;
}

// From `rest` on all is content.
void AnswerParser::Impl::give_up(size_t rest, std::vector<AnswerDelta> & out) {
    broken = true;
    run = Run::NONE;
    tell(AnswerDelta::CONTENT, text.substr(rest), out);
}

void AnswerParser::Impl::read(std::vector<AnswerDelta> & out) {
    Parse found = parse(text.size());
    if (found.ok) {
        parsed = text.size();
        tell(found, out);
        begin_run(found);
        return;
    }
    // The longest beginning that may be read: it was good at `parsed`, and is not at the end.
    size_t good = parsed, bad = text.size();
    while (bad - good > 1) {
        const size_t middle = good + (bad - good) / 2;
        (parse(middle).ok ? good : bad) = middle;
    }
    while (good > format->prefix.size() && ((unsigned char) text[good] & 0xC0) == 0x80) --good; // not within a character
    found = parse(good);
    size_t rest = format->prefix.size();
    if (found.ok) {
        tell(found, out);
        rest = found.complete ? found.end : found.told_end;
        // A call whose name never came was not told, and is content from its first mark on.
        if (!found.complete && found.n_calls > told.tool_calls.size()) rest = found.before_call;
    }
    give_up(rest, out);
}

void AnswerParser::Impl::feed(const std::string & piece, std::vector<AnswerDelta> & out) {
    if (broken) {
        tell(AnswerDelta::CONTENT, piece, out);
        return;
    }
    // A character at a time, so that what is told does not depend on where the pieces end.
    for (size_t at = 0; at < piece.size() && !broken;) {
        size_t end = at + 1;
        while (end < piece.size() && ((unsigned char) piece[end] & 0xC0) == 0x80) ++end;
        text.append(piece, at, end - at);
        at = end;
        if (run != Run::NONE && go_on(out)) continue;
        run = Run::NONE;
        if ((text.size() - parsed) * SHARE >= text.size()) read(out);
        if (broken) tell(AnswerDelta::CONTENT, piece.substr(at), out);
    }
}

void AnswerParser::Impl::finish(std::vector<AnswerDelta> & out) {
    if (broken) return;
    if (run == Run::NONE && parsed < text.size()) read(out);
    if (broken) return;
    if (run == Run::REASONING || run == Run::CONTENT) {
        // What might have become a delimiter is none.
        tell(run == Run::REASONING ? AnswerDelta::REASONING : AnswerDelta::CONTENT, text.substr(told_to), out);
    }
    if (run != Run::NONE) return;
    const Parse found = parse(text.size());
    const size_t rest = found.complete ? found.end : found.told_end;
    if (!found.ok || is_blank(text, rest)) return;
    if (found.complete || found.last == Parse::TEXT || found.last == Parse::NOTHING) {
        tell(AnswerDelta::CONTENT, text.substr(rest), out);
    } else if (found.last == Parse::THOUGHTS && may_end(rest)) {
        tell(AnswerDelta::REASONING, text.substr(rest), out);
    }
}

AnswerParser::AnswerParser(std::shared_ptr<const AnswerFormat> format) : impl(std::make_unique<Impl>(std::move(format))) {}

AnswerParser::~AnswerParser() = default;

void AnswerParser::feed(const std::string & piece, std::vector<AnswerDelta> & out) noexcept {
    try {
        impl->feed(piece, out);
    } catch (...) { // no memory
        impl->broken = true;
    }
}

void AnswerParser::finish(std::vector<AnswerDelta> & out) noexcept {
    try {
        impl->finish(out);
    } catch (...) {
        impl->broken = true;
    }
}

size_t AnswerParser::size() const noexcept {
    return impl->run == Impl::Run::NONE && !impl->broken ? impl->text.size() : 0;
}

int AnswerParser::contradictions() const noexcept { return impl->n_contradictions; }

} // namespace mullama
