"""Every known field of a request, whoever made it up: taken, harmless, or refused. The one table of them.

Fields that change an answer and are not built are refused by name rather than ignored. docs/api.md is made from this
table (``python -m mullama.web.openai.fields docs/api.md``; a test compares), and another test compares the fields that
are taken with those of the schemas.
"""

from __future__ import annotations

import codecs
import enum
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from mullama.errors import InvalidRequest

CHAT, TEXT = "chat", "completions"
BOTH = (CHAT, TEXT)
VECTORS = "embeddings"  # and rerank and score
OPENAI, VLLM, LLAMA, TGI, OURS = "OpenAI", "vLLM", "llama-server", "TGI", "mullama"


class Verdict(enum.StrEnum):
    TAKEN = "taken"
    HARMLESS = "harmless"  # ignored: the answer is the same
    REFUSED = "refused"  # 400, unless its value asks for nothing


@dataclass(slots=True, frozen=True)
class Field:
    """A field of ``endpoints``. ``says``: why a harmless one is; what a refused one asks for, and what there is
    instead behind a semicolon."""

    name: str
    maker: str
    verdict: Verdict
    says: str = ""
    endpoints: tuple[str, ...] = BOTH
    idle: tuple[Any, ...] = (False, "", [], {})  # values of a refused one that ask for nothing, as null does


def _taken(maker: str, names: str, endpoints: tuple[str, ...] = BOTH) -> list[Field]:
    return [Field(name, maker, Verdict.TAKEN, endpoints=endpoints) for name in names.split()]


def _harmless(maker: str, says: str, names: str, endpoints: tuple[str, ...] = BOTH) -> list[Field]:
    return [Field(name, maker, Verdict.HARMLESS, says, endpoints) for name in names.split()]


def _refused(
    maker: str,
    says: str,
    names: str,
    *also_idle: Any,
    endpoints: tuple[str, ...] = BOTH,
    only: tuple[Any, ...] | None = None,
) -> list[Field]:
    """``also_idle``: further values that ask for nothing; ``only``: these alone do."""
    idle = (False, "", [], {}, *also_idle) if only is None else only
    return [Field(name, maker, Verdict.REFUSED, says, endpoints, idle) for name in names.split()]


FIELDS: tuple[Field, ...] = (
    *_taken(OPENAI, "model stream stream_options n max_tokens stop seed temperature top_p presence_penalty"),
    *_taken(OPENAI, "frequency_penalty logit_bias user response_format"),
    *_taken(OPENAI, "messages max_completion_tokens modalities tools tool_choice parallel_tool_calls", (CHAT,)),
    *_taken(OPENAI, "reasoning_effort", (CHAT,)),
    *_taken(OPENAI, "prompt echo best_of", (TEXT,)),
    *_taken(OPENAI, "safety_identifier"),
    *_taken(VLLM, "structured_outputs guided_json guided_regex guided_choice guided_grammar"),
    *_taken(LLAMA, "grammar json_schema"),
    *_taken(VLLM, "min_tokens ignore_eos top_k min_p repetition_penalty priority cache_salt"),
    *_taken(VLLM, "truncate_prompt_tokens truncation_side"),
    *_taken(VLLM, "add_generation_prompt continue_final_message chat_template_kwargs include_reasoning", (CHAT,)),
    *_taken(LLAMA, "reasoning_format", (CHAT,)),
    *_taken(
        LLAMA, "typical_p repeat_penalty repeat_last_n dry_multiplier dry_base dry_allowed_length dry_penalty_last_n"
    ),
    *_taken(LLAMA, "dry_sequence_breakers xtc_probability xtc_threshold mirostat mirostat_tau mirostat_eta lora"),
    *_taken(LLAMA, "n_predict timings_per_token"),
    *_taken(OURS, "slo_ms preempt context_policy keep_alive"),
    # -- what would change the answer, and is not there
    *_refused(OPENAI, "this name; tools is the one", "functions", endpoints=(CHAT,)),
    *_refused(OPENAI, "this name; tool_choice is the one", "function_call", "none", "auto", endpoints=(CHAT,)),
    *_refused(OPENAI, "log-probabilities", "logprobs", endpoints=(CHAT,)),
    *_refused(OPENAI, "log-probabilities", "top_logprobs", 0, endpoints=(CHAT,)),
    *_refused(OPENAI, "log-probabilities", "logprobs", endpoints=(TEXT,), only=(False,)),
    *_refused(OPENAI, "filling in the middle", "suffix", endpoints=(TEXT,)),
    *_refused(OPENAI, "levels of reasoning", "reasoning_effort", endpoints=(TEXT,)),
    *_refused(OPENAI, "levels of verbosity", "verbosity", "medium", endpoints=(CHAT,)),
    *_refused(OPENAI, "searching the web", "web_search_options", only=()),
    *_refused(OPENAI, "predicted outputs", "prediction", only=()),
    *_refused(OPENAI, "sound", "audio", endpoints=(CHAT,)),
    *_refused(OPENAI, "moderation", "moderation", endpoints=(CHAT,)),
    *_refused(VLLM, "other white space in JSON", "guided_whitespace_pattern"),
    *_refused(VLLM, "stopping at tokens; stop takes strings", "stop_token_ids"),
    *_refused(VLLM, "stop strings in the text", "include_stop_str_in_output"),
    *_refused(VLLM, "forbidden words; logit_bias takes tokens", "bad_words"),
    *_refused(VLLM, "a list of the tokens that may come; logit_bias takes tokens", "allowed_token_ids"),
    *_refused(VLLM, "processors of logits", "logits_processors"),
    *_refused(VLLM, "beam search", "use_beam_search"),
    *_refused(VLLM, "watermarks", "watermarking"),
    *_refused(VLLM, "detecting repetitions", "repetition_detection"),
    *_refused(VLLM, "control tokens in the text", "skip_special_tokens", endpoints=BOTH, only=(True,)),
    *_refused(VLLM, "log-probabilities", "prompt_logprobs logprob_token_ids", only=(False, [])),
    *_refused(VLLM, "token ids in the answer", "return_token_ids"),
    *_refused(VLLM, "the prompt's text in the answer", "return_prompt_text", endpoints=(CHAT,)),
    *_refused(VLLM, "experts in the answer", "routed_experts_prompt_start", 0),
    *_refused(VLLM, "prompts as embeddings", "prompt_embeds", endpoints=(TEXT,)),
    *_refused(
        VLLM,
        "prompts without special tokens; a list of token ids has none",
        "add_special_tokens",
        endpoints=(TEXT,),
        only=(True,),
    ),
    *_refused(VLLM, "special tokens beyond those of the template", "add_special_tokens", endpoints=(CHAT,)),
    *_refused(VLLM, "the last message in the answer", "echo", endpoints=(CHAT,)),
    *_refused(VLLM, "several tries for one choice", "best_of", 1, endpoints=(CHAT,)),
    *_refused(VLLM, "going on with the last message", "continue_final_message", endpoints=(TEXT,)),
    *_refused(VLLM, "templates in requests; --chat-template sets the model's", "chat_template"),
    *_refused(VLLM, "arguments of the template", "chat_template_kwargs", endpoints=(TEXT,)),
    *_refused(VLLM, "documents", "documents"),
    *_refused(VLLM, "budgets for thoughts", "thinking_token_budget", -1),
    *_refused(VLLM, "KV from other servers", "kv_transfer_params ec_transfer_params"),
    *_refused(VLLM, "arguments of extensions", "vllm_xargs"),
    *_refused(LLAMA, "grammars that begin within the answer", "grammar_lazy grammar_triggers"),
    *_refused(TGI, "this name; max_tokens is the one", "max_new_tokens", only=()),
    *_refused(LLAMA, "this name; n is the one", "n_cmpl", 1),
    *_refused(LLAMA, "a time limit for the answer", "t_max_predict_ms", 0, -1),
    *_refused(LLAMA, "indentation of lines", "n_indent", 0),
    *_refused(LLAMA, "other tokens to keep when the context shifts", "n_keep n_discard", 0),
    *_refused(LLAMA, "log-probabilities", "n_probs", 0),
    *_refused(LLAMA, "another order of samplers", "samplers", only=()),
    *_refused(LLAMA, "a least number of candidates", "min_keep", 0),
    *_refused(LLAMA, "top-n-sigma sampling", "top_n_sigma", 0, -1),
    *_refused(LLAMA, "temperatures that follow the entropy", "dynatemp_range", 0),
    *_refused(LLAMA, "adaptive probabilities", "adaptive_target", -1),
    *_refused(LLAMA, "penalties for newlines", "penalize_nl"),
    *_refused(LLAMA, "token ids in the answer", "return_tokens"),
    *_refused(LLAMA, "a choice of the answer's members", "response_fields"),
    *_refused(LLAMA, "separating thoughts from the text", "reasoning_format", "none", endpoints=(TEXT,)),
    *_refused(LLAMA, "budgets for thoughts", "thinking_budget_tokens reasoning_budget_tokens", -1),
    *_refused(LLAMA, "thoughts that are opened", "thinking_forced_open", endpoints=(CHAT,)),
    *_refused(LLAMA, "other parsers of the answer", "chat_format chat_parser generation_prompt", endpoints=(CHAT,)),
    # -- what may be there or not
    *_harmless(OPENAI, "chats are not stored; /v1/responses keeps answers", "store metadata"),
    *_harmless(OPENAI, "there is one tier", "service_tier"),
    *_harmless(
        OPENAI,
        "prefixes are found by their tokens, and no key keeps them apart; cache_salt does",
        "prompt_cache_key prompt_cache_retention prompt_cache_options",
    ),
    *_harmless(VLLM, "names the request", "request_id session_id"),
    *_harmless(VLLM, "every chunk has what there is", "stream_interval"),
    *_harmless(VLLM, "control tokens are not shown", "spaces_between_special_tokens"),
    *_harmless(VLLM, "about beam search", "length_penalty"),
    *_harmless(VLLM, "there is one: llguidance", "guided_decoding_backend"),
    *_harmless(VLLM, "about log-probabilities", "return_tokens_as_token_ids"),
    *_harmless(VLLM, "there are no pictures", "mm_processor_kwargs media_io_kwargs return_mm_kwargs"),
    *_harmless(VLLM, "vLLM ignores it here as well", "return_token_offsets"),
    *_harmless(LLAMA, "reused KV does not change the answer", "cache_prompt n_cache_reuse id_slot"),
    *_harmless(LLAMA, "X-Profile has the times", "return_progress verbose"),
    *_harmless(LLAMA, "a matter of the connection", "sse_ping_interval"),
    *_harmless(LLAMA, "where samplers run does not change the answer", "backend_sampling"),
    *_harmless(
        LLAMA,
        "drafts do not change the answer",
        "speculative.type speculative.n_max speculative.n_min speculative.p_min",
    ),
    *_harmless(LLAMA, "about grammars", "grammar_type preserved_tokens"),
    *_harmless(LLAMA, "about other fields, which are refused", "dynatemp_exponent adaptive_decay post_sampling_probs"),
    *_harmless(LLAMA, "about tool calls", "parse_tool_calls", (CHAT,)),
    *_harmless(LLAMA, "llama-server does not look at it either", "t_max_prompt_ms"),
)

#: Those of embeddings, rerank and score that are refused; docs/embeddings.md has the others.
_OF_VECTORS: tuple[Field, ...] = (
    *_refused(VLLM, "chats as texts; input takes texts", "messages", endpoints=(VECTORS,)),
    *_refused(VLLM, "templates in requests", "chat_template chat_template_kwargs", endpoints=(VECTORS,)),
    *_refused(VLLM, "other types of numbers", "embed_dtype", "float32", endpoints=(VECTORS,)),
    *_refused(VLLM, "another order of bytes", "endianness", "native", "little", endpoints=(VECTORS,)),
    *_refused(VLLM, "pictures", "mm_processor_kwargs data_1 data_2", endpoints=(VECTORS,)),
    *_refused(OPENAI, "kinds of input", "input_type", endpoints=(VECTORS,)),
    *_refused(OURS, "limits of a document; truncate_prompt_tokens cuts", "max_tokens_per_doc", endpoints=(VECTORS,)),
    *_refused(OURS, "fields that are ranked", "rank_fields", endpoints=(VECTORS,)),
)

_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_REFUSED = {
    endpoint: {one.name: one for one in FIELDS if one.verdict is Verdict.REFUSED and endpoint in one.endpoints}
    for endpoint in BOTH
} | {VECTORS: {one.name: one for one in _OF_VECTORS}}


def taken(endpoint: str) -> set[str]:
    """The names of the fields that an endpoint takes."""
    return {one.name for one in FIELDS if one.verdict is Verdict.TAKEN and endpoint in one.endpoints}


def field_schemas(endpoint: str) -> dict[str, dict[str, Any]]:
    """JSON Schema of the fields that are refused, unless they ask for nothing, and of those that are harmless."""
    found: dict[str, dict[str, Any]] = {}
    for one in FIELDS:
        if endpoint not in one.endpoints or one.verdict is Verdict.TAKEN:
            continue
        if one.verdict is Verdict.HARMLESS:
            found[one.name] = {"description": f"Ignored: {one.says}."}
        else:
            found[one.name] = {"enum": [None, *one.idle], "description": f"Not there yet: {one.says}."}
    return found


def refuse_unbuilt(data: bytes, endpoint: str) -> None:
    """Raises InvalidRequest for a refused field whose value asks for something. ``data`` is a JSON object that was
    decoded once. PERF: a quarter of a microsecond; values are skipped over, not made."""
    members = _members.decode(data.removeprefix(codecs.BOM_UTF8))
    for name in sorted(members.keys() & _REFUSED[endpoint].keys()):
        one = _REFUSED[endpoint][name]
        value = msgspec.json.decode(members[name])
        if value is not None and not any(_same(value, idle) for idle in one.idle):
            what, _, instead = one.says.partition("; ")
            words = f"{what} yet{instead and '; '}{instead}"
            raise InvalidRequest(f"{name}: this server does not support {words}; leave the field out", param=name)


def _same(value: Any, idle: Any) -> bool:
    return value == idle and isinstance(value, bool) == isinstance(idle, bool)


# -- the page -----------------------------------------------------------------------------------------------------

BEGIN = "<!-- Made by `python -m mullama.web.openai.fields docs/api.md`; do not edit. -->"
END = "<!-- The end of what is made. -->"


def page() -> str:
    """The part of docs/api.md between the two marks, with them."""
    lines = [BEGIN, "", "Taken, and described above:", ""]
    for maker in (OPENAI, VLLM, LLAMA, OURS):
        names = dict.fromkeys(one.name for one in FIELDS if one.verdict is Verdict.TAKEN and one.maker == maker)
        lines.append(f"- {maker}: {_code(names)}")
    lines += ["", "Refused with 400 until they are built. `null` is always the same as leaving a field out.", ""]
    lines += ["| field | of | endpoints | what it asks for | asks for nothing as |", "|---|---|---|---|---|"]
    for one in FIELDS:
        if one.verdict is Verdict.REFUSED:
            idle = ", ".join(f"`{msgspec.json.encode(value).decode()}`" for value in one.idle) or "nothing but `null`"
            lines.append(f"| `{one.name}` | {one.maker} | {_both(one.endpoints)} | {one.says} | {idle} |")
    lines += ["", "Harmless: ignored, and the answer is the same.", ""]
    lines += ["| field | of | endpoints | why |", "|---|---|---|---|"]
    for one in FIELDS:
        if one.verdict is Verdict.HARMLESS:
            lines.append(f"| `{one.name}` | {one.maker} | {_both(one.endpoints)} | {one.says} |")
    return "\n".join([*lines, "", END])


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _both(endpoints: tuple[str, ...]) -> str:
    return "both" if endpoints == BOTH else endpoints[0]


def main() -> None:
    """Bring the page that is named up to date."""
    path = Path(sys.argv[1])
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    path.write_text(before + page() + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
