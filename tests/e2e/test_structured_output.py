"""Structured output by the official client, from a real process."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from .support import NAME, ServerProcess

ASK: Any = [{"role": "user", "content": "Name a river of Europe and its length in kilometres, as JSON."}]


class River(BaseModel):
    name: str = Field(max_length=20)
    kilometres: int = Field(ge=1, le=9999)
    countries: list[Literal["France", "Italy", "Spain"]] = Field(max_length=2)


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def test_parse_with_pydantic(client: openai.OpenAI) -> None:
    for seed in range(4):
        answer = client.chat.completions.parse(
            model=NAME, messages=ASK, response_format=River, seed=seed, max_tokens=400, n=2
        )
        assert all(isinstance(choice.message.parsed, River) for choice in answer.choices)


def test_json_object_streamed_and_not(client: openai.OpenAI) -> None:
    options: Any = {
        "model": NAME, "messages": ASK, "response_format": {"type": "json_object"}, "temperature": 0,
        "max_tokens": 200,
    }  # fmt: skip
    whole = client.chat.completions.create(**options).choices[0]
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**options, stream=True)]
    assert "".join(pieces) == whole.message.content
    if whole.finish_reason == "stop":
        assert isinstance(json.loads(whole.message.content or ""), dict)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_choice": ["Rhine", "Danube"]}, "Rhine|Danube"),
        ({"structured_outputs": {"regex": "[A-Z][a-z]{2,9}, [0-9]{3,4} km"}}, "[A-Z][a-z]{2,9}, [0-9]{3,4} km"),
        ({"grammar": 'root ::= [A-Z] [a-z]+ "."'}, r"[A-Z][a-z]+\."),
        ({"grammar": 'start: NAME " flows."\nNAME: /[A-Z][a-z]{1,8}/'}, r"[A-Z][a-z]{1,8} flows\."),
    ],
)
def test_texts(client: openai.OpenAI, fields: dict[str, Any], pattern: str) -> None:
    choice = client.chat.completions.create(model=NAME, messages=ASK, max_tokens=60, extra_body=fields).choices[0]
    assert choice.finish_reason == "length" or re.fullmatch(pattern, choice.message.content or "")


def test_what_cannot_be_enforced_is_refused(client: openai.OpenAI) -> None:
    schema = {"type": "object", "propertyNames": {"maxLength": 3}}
    with pytest.raises(openai.BadRequestError, match="propertyNames") as caught:
        client.chat.completions.create(
            model=NAME, messages=ASK,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )  # fmt: skip
    assert caught.value.param == "response_format.json_schema.schema"
