"""Answers are read as every template that llama.cpp ships writes them, and the same in whatever pieces they come."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mullama._core import Model
from mullama._core.chat.parsing import AnswerFormat, AnswerParser
from mullama.engine.requests.chats import Chats
from mullama.errors import InvalidRequest
from mullama.types import ChatAsk
from mullama.web.chat.functions import Calls, FunctionBody, Thinking, ask_of

TEMPLATES = sorted((Path(__file__).parents[2] / "vendor/llama.cpp/models/templates").glob("*.jinja"))
USER = {"role": "user", "content": "What is the weather in Paris?"}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
}
FUNCTIONS = (
    FunctionBody("get_weather", "The weather of a city.", SCHEMA),
    FunctionBody(
        "find", "Find a text.", {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    ),
)
ASK = ask_of(Calls(FUNCTIONS), Thinking(), parallel=True)
#: A text for arguments that is none of a template's markup.
TEXT = 'line "one"\n\tline two: ü 漢字 😀 <b> & {x} [y] \\ / end  '


def read(parser: AnswerParser, pieces: Sequence[str], *, is_garbage: bool = False) -> dict[str, Any]:
    """The message that an answer is. What a model writes beside every form may be read otherwise later on."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": []}
    told = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
    for kind, index, text, _ in told:
        if kind == "call":
            assert index == len(message["calls"])
            message["calls"].append([text, ""])
        elif kind == "arguments":
            assert index == len(message["calls"]) - 1
            message["calls"][-1][1] += text
        else:
            message[kind] += text
    assert is_garbage or parser.contradictions == 0
    return message


def cut(text: str, at: Sequence[int]) -> list[str]:
    places = [0, *sorted({place % (len(text) + 1) for place in at}), len(text)]
    return [text[one:other] for one, other in itertools.pairwise(places)]


@pytest.fixture(scope="module")
def chats(models: Callable[..., Model]) -> Callable[[str], Chats]:
    def get(source: str) -> Chats:
        return Chats(models().twin(chat_template=source), parses_special=True)

    return get


def message_of(**more: Any) -> bytes:
    return json.dumps([USER, {"role": "assistant", **more}]).encode()


def written(chats: Chats, ask: ChatAsk, **message: Any) -> tuple[str, AnswerFormat] | None:
    """What the model writes for an answer, by its template, and its parser; None: the template takes no such answer."""
    begun = chats.open(json.dumps([USER]).encode(), ask, add_generation_prompt=True)
    try:
        whole = chats.open(message_of(**message), ask, add_generation_prompt=False).prompt
    except InvalidRequest:
        return None
    assert begun.form is not None
    pairs = zip(whole, begun.prompt, strict=False)
    n_same = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(whole), len(begun.prompt)))
    if begun.prompt[n_same:]:  # both go on with another mark, which may begin alike
        n_same = 1 + max(whole.rfind(end, 0, n_same) for end in "\n>")
    answer, opened = whole[n_same:], begun.prompt[n_same:]
    # A prompt may end in the beginning of a thought, which the template leaves out of answers that are over.
    thought = f"Hm.{begun.form.thinking_ends[0]}" if opened and begun.form.thinking_ends else ""
    return thought + answer, begun.form.new_parser


def calls_of(*arguments: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"id": f"call0000{i}", "type": "function", "function": {"name": name, "arguments": json.dumps(given)}}
        for i, (name, given) in enumerate(arguments)
    ]


WEATHER = ("get_weather", {"city": "Paris", "days": 3})
FIND = ("find", {"text": TEXT})


#: Templates of which no answer with a call can be had this way: they leave calls of earlier answers out, or show them
#: in another form than the one that the model is to write.
NOT_SHOWN = (
    *("LFM2-8B-A1B", "LFM2.5-Instruct", "ibm-granite-granite-3.3-2B-Instruct", "Cohere2MoE", "upstage-Solar-Open-100B"),
    *("CohereForAI-c4ai-command-r-plus-tool_use", "Mistral-Small-3.2-24B-Instruct-2506", "llama-cpp-deepseek-r1"),
    *("Qwen3.5-4B", "StepFun3.5-Flash"),
)


def test_there_are_templates() -> None:
    assert len(TEMPLATES) > 60


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_call_that_a_template_writes_is_read(path: Path, chats: Callable[[str], Chats]) -> None:
    chat = chats(path.read_text())
    if not chat.model.chat_caps()["supports_tools"]:
        pytest.skip("it knows no functions")
    if path.stem in NOT_SHOWN:
        pytest.skip("what the model writes is not to be had of it")
    found = written(chat, ASK, content="", tool_calls=calls_of(WEATHER))
    print(repr(found and found[0]))
    assert found is not None
    answer, parser = found
    message = read(parser(), [answer])
    assert [(name, json.loads(given)) for name, given in message["calls"]] == [WEATHER]
    for seed in range(3):
        rng = random.Random(seed)
        pieces = cut(answer, [rng.randrange(len(answer) + 1) for _ in range(rng.choice((2, 8, 1000)))])
        assert read(parser(), pieces) == message


#: What a model may write: the markup of any template, and texts that break it.
MARKS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_call>\n", '{"name": "get_weather", "arguments": '),
    *('{"city": "Paris", "days": 3}', "}", "\n", " ", "<", "</", "{", '"', "\\", "[TOOL_CALLS]", "[ARGS]", "[THINK]"),
    *(
        "<|channel|>",
        "analysis",
        "final",
        "commentary",
        " to=functions.get_weather",
        "<|message|>",
        "<|start|>assistant",
    ),
    *("<|end|>", "<function=get_weather>", "<parameter=city>\n", "\n</parameter>\n", "</function>", "<|python_tag|>"),
    *("[get_weather(city=", "'Paris'", ", days=3)]", "Hello", "ü漢😀", "<arg_key>city</arg_key>", "<arg_value>Rom"),
    *("</arg_value>", "get_weather", ">>>all\n", ">>>get_weather\n", "<|tool_calls_section_begin|>", "1.5", "[1, [2"),
)
ANSWERS = st.lists(st.one_of(st.sampled_from(MARKS), st.text(max_size=5)), max_size=12).map("".join)
PLACES = st.lists(st.integers(0, 10_000), max_size=12)


@pytest.fixture(scope="module")
def formats(models: Callable[..., Model]) -> list[tuple[str, AnswerFormat, str]]:
    """Of every template: its name, the format of answers with functions, and an answer with two calls."""
    found = []
    for path in TEMPLATES:
        chat = Chats(models().twin(chat_template=path.read_text()), parses_special=True)
        begun = chat.open(json.dumps([USER]).encode(), ASK, add_generation_prompt=True)
        assert begun.form is not None
        example = written(chat, ASK, content="So: ", reasoning_content="Hm.", tool_calls=calls_of(WEATHER))
        found.append((path.stem, begun.form.new_parser, "" if example is None else example[0]))
    return found


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_an_answer_is_read_the_same_in_any_pieces(formats: Any, data: st.DataObject) -> None:
    """Whatever the model writes, in the form of any template: pieces change nothing."""
    _, new_parser, example = data.draw(st.sampled_from(formats))
    answer = data.draw(ANSWERS).encode("utf-8", "replace").decode()
    at = data.draw(st.integers(0, len(example)))
    text = example[:at] + answer + data.draw(st.sampled_from(("", example[at:])))
    whole = read(new_parser(), [text], is_garbage=True)
    assert read(new_parser(), cut(text, data.draw(PLACES)), is_garbage=True) == whole
    assert read(new_parser(), list(text), is_garbage=True) == whole


def test_plain_words_are_content_in_any_form(formats: Any) -> None:
    for name, new_parser, _ in formats:
        message = read(new_parser(), ["Hello ", "world."])
        told = message["content"] + message["reasoning"]
        assert told == "Hello world." and not message["calls"], (name, message)


def test_a_template_without_functions_shows_them(chats: Callable[[str], Chats]) -> None:
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    source = turns + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    chat = chats(source)
    assert not chat.model.chat_caps()["supports_tools"]
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": calls_of(WEATHER)},
        {"role": "tool", "content": "sun", "tool_call_id": "call00000"},
    ]
    opened = chat.open(json.dumps(messages).encode(), ASK, add_generation_prompt=True)
    assert opened.prompt.startswith("<|system|>") and '"name": "get_weather"' in opened.prompt
    assert (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>' in opened.prompt
    )
    assert opened.prompt.endswith("<|user|><tool_response>\nsun\n</tool_response>\n<|assistant|>")
    assert opened.form is not None
    call = '<tool_call>\n{"name": "find", "arguments": {"text": "a\\"b"}}\n</tool_call>'
    message = read(opened.form.new_parser(), ["Let me look.\n", call, "\n", call])
    assert message["content"] == "Let me look.\n"
    assert [(name, json.loads(given)) for name, given in message["calls"]] == [("find", {"text": 'a"b'})] * 2
    unknown = call.replace("find", "destroy")
    assert read(opened.form.new_parser(), [unknown]) == {"content": unknown, "reasoning": "", "calls": []}
    # Without functions the prompt has none, and the calls of earlier answers all the same.
    plain = chat.open(json.dumps(messages).encode(), ChatAsk(), add_generation_prompt=True)
    assert plain.form is None and "<tools>" not in plain.prompt and "<tool_response>" in plain.prompt


def test_what_functions_say_stays_text(models: Callable[..., Model]) -> None:
    model = models().twin(chat_template=(Path(TEMPLATES[0]).parent / "Qwen-Qwen3-0.6B.jinja").read_text())
    control = [text for text, _, _ in model.control_tokens() if len(text) > 3]
    if not control:
        pytest.skip("the vocabulary has no control tokens")
    chat = Chats(model, parses_special=False)
    forged = ask_of(Calls((FunctionBody("f", f"a {control[0]} b", SCHEMA),)), Thinking(), parallel=True)
    prompt = chat.open(json.dumps([USER]).encode(), forged, add_generation_prompt=True).prompt
    parts = getattr(prompt, "parts", ())
    assert any(control[0] in text and not special for text, special in parts)


def test_nesting_ends_nothing(formats: Any) -> None:
    for name, new_parser, example in formats:
        for text in ("[" * 100_000, '{"a":' * 100_000):
            at = example.find("Paris")
            message = read(new_parser(), [example[:at] + text, text, "x"], is_garbage=True)
            assert message["content"] or message["reasoning"] or message["calls"], name


def test_a_long_answer_costs_no_more_than_its_length(formats: Any) -> None:
    """Words, and a text in arguments, of 200,000 characters in tokens of four: seconds at most on any machine."""
    words = "All work and no play <b>makes</b> Jack a dull boy.\n" * 4000
    for name, new_parser, example in formats:
        if name not in ("Qwen-Qwen3-0.6B", "Qwen3-Coder", "openai-gpt-oss-120b", "meta-llama-Llama-3.1-8B-Instruct"):
            continue
        at = example.find("Paris")
        began = time.process_time()
        for head in ("", example[:at]):
            parser = new_parser()
            parser.feed(head)
            text = words if not head else json.dumps(words)[1:-1]
            for start in range(0, len(text), 4):
                parser.feed(text[start : start + 4])
            parser.finish()
        assert time.process_time() - began < 20, name


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/a0"}},
         "$defs": {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(60)}},
        {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/a0"}},
         "$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(9000)}},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "(" * 5000}}},
        {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "array"}, "minItems": 10**9}}},
        {"type": "object", "properties": {"": {"enum": list(range(9000))}, "b\n\"": {"type": ["null", "weird"]}}},
    ],
    ids=["members", "twice", "cycle", "chain", "pattern", "items", "enum"],
)  # fmt: skip
def test_no_schema_makes_a_parser_dear(chats: Callable[[str], Chats], parameters: dict[str, Any]) -> None:
    ask = ask_of(Calls((FunctionBody("f", None, parameters),)), Thinking(), parallel=True)
    for name in ("Qwen3-Coder", "Qwen-Qwen3-0.6B", "openai-gpt-oss-120b", "MiniMax-M3"):
        chat = chats((TEMPLATES[0].parent / f"{name}.jinja").read_text())
        began = time.process_time()
        try:
            opened = chat.open(json.dumps([USER]).encode(), ask, add_generation_prompt=True)
        except InvalidRequest as error:
            assert "template" in error.message  # it may be too much for the template to show
        else:
            assert opened.form is not None
            read(opened.form.new_parser(), ["Hello"])
        assert time.process_time() - began < 5, name


def test_a_hundred_functions(chats: Callable[[str], Chats]) -> None:
    functions = tuple(FunctionBody(f"tool_{i}", "Does something.", SCHEMA) for i in range(100))
    ask = ask_of(Calls(functions), Thinking(), parallel=True)
    for name in ("Qwen3-Coder", "Qwen-Qwen3-0.6B", "openai-gpt-oss-120b", "meta-llama-Llama-3.1-8B-Instruct"):
        chat = chats((TEMPLATES[0].parent / f"{name}.jinja").read_text())
        call = calls_of(("tool_99", {"city": "Rome", "days": 2}))
        found = written(chat, ask, content="", tool_calls=call)
        assert found is not None
        answer, parser = found
        assert read(parser(), list(answer))["calls"][0][0] == "tool_99"
