"""Answers are read as every template that llama.cpp ships writes them, and the same in whatever pieces they come."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mullama._core import Model
from mullama._core.model.answers import AnswerFormat, AnswerParser
from mullama.engine.requests.chats import Chats
from mullama.errors import InvalidRequest
from mullama.types import ChatAsk
from mullama.web.openai.functions import Calls, FunctionBody, Thinking, ask_of

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


def read(parser: AnswerParser, pieces: Sequence[str]) -> dict[str, Any]:
    """The message that an answer is."""
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
    assert parser.contradictions == 0
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
    if not whole.startswith(begun.prompt):
        return None
    return whole.removeprefix(begun.prompt), begun.form.new_parser


def calls_of(*arguments: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"id": f"call0000{i}", "type": "function", "function": {"name": name, "arguments": json.dumps(given)}}
        for i, (name, given) in enumerate(arguments)
    ]


WEATHER = ("get_weather", {"city": "Paris", "days": 3})
FIND = ("find", {"text": TEXT})


def test_there_are_templates() -> None:
    assert len(TEMPLATES) > 60


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_call_that_a_template_writes_is_read(path: Path, chats: Callable[[str], Chats]) -> None:
    chat = chats(path.read_text())
    if not chat.model.chat_caps()["supports_tools"]:
        pytest.skip("it knows no functions")
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
