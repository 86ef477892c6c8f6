"""The official clients of Anthropic's and Ollama's APIs, unchanged, against a real server with real weights."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import ollama
import pytest

from .support import NAME, ServerProcess

#: The client's newest version does not name it any more.
GREEDY = {"temperature": 0}
FRUIT: list[anthropic.types.MessageParam] = [{"role": "user", "content": "Name a fruit."}]


@pytest.fixture
def claude(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def llama(server: ServerProcess) -> ollama.Client:
    return ollama.Client(host=server.url)


def said(server: ServerProcess, n_tokens: int) -> str:
    """What OpenAI's endpoint answers."""
    reply = server.chat([{"role": "user", "content": "Name a fruit."}], max_tokens=n_tokens, temperature=0)
    text: str = reply["choices"][0]["message"]["content"]
    return text


def test_messages(server: ServerProcess, claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(model=NAME, max_tokens=6, messages=FRUIT, extra_body=GREEDY)
    (block,) = message.content
    assert isinstance(block, anthropic.types.TextBlock) and block.text == said(server, 6)
    assert message.stop_reason == "max_tokens" and message.role == "assistant" and message.model == NAME
    counted = claude.messages.count_tokens(model=NAME, messages=FRUIT).input_tokens
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == counted
    assert message.usage.output_tokens == 6


def test_messages_streamed(server: ServerProcess, claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(model=NAME, max_tokens=6, messages=FRUIT, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == said(server, 6)
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 6


def test_a_stop_sequence(server: ServerProcess, claude: anthropic.Anthropic) -> None:
    word = said(server, 6).split()[1]
    message = claude.messages.create(model=NAME, max_tokens=6, messages=FRUIT, stop_sequences=[word], extra_body=GREEDY)
    assert message.stop_reason == "stop_sequence" and message.stop_sequence == word


def test_errors_are_those_of_the_client(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="none", max_tokens=1, messages=FRUIT)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.create(model=NAME, max_tokens=0, messages=FRUIT)


def test_ollama_chat(server: ServerProcess, llama: ollama.Client) -> None:
    options = {"temperature": 0, "num_predict": 6}
    messages = [{"role": "user", "content": "Name a fruit."}]
    whole = llama.chat(model=NAME, messages=messages, options=options)
    assert whole.message.content == said(server, 6)
    assert whole.done and whole.done_reason == "length" and whole.eval_count == 6
    assert (whole.total_duration or 0) > (whole.eval_duration or 0) > 0
    parts = list(llama.chat(model=f"{NAME}:latest", messages=messages, options=options, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert [part.done for part in parts].count(True) == 1 and parts[-1].done


def test_ollama_generate(server: ServerProcess, llama: ollama.Client) -> None:
    options = {"temperature": 0, "num_predict": 6}
    templated = llama.generate(model=NAME, prompt="Name a fruit.", options=options)
    assert templated.response == said(server, 6)
    raw = llama.generate(model=NAME, prompt="Once upon a time", raw=True, options=options)
    text = server.complete("Once upon a time", max_tokens=6, temperature=0)["choices"][0]["text"]
    assert raw.response == text
    assert llama.generate(model=NAME, prompt="").done_reason == "load"


def test_ollama_models(llama: ollama.Client) -> None:
    (model,) = (one for one in llama.list().models if one.model == NAME)
    assert model.details is not None and model.details.family == "llama"
    assert [one.model for one in llama.ps().models] == [NAME]
    shown = llama.show(NAME)
    assert shown.capabilities == ["completion"] and "im_start" in (shown.template or "")
    with pytest.raises(ollama.ResponseError, match="embeddings"):
        llama.embed(model=NAME, input="x")
    with pytest.raises(ollama.ResponseError, match="not served"):
        llama.chat(model="none", messages=[{"role": "user", "content": "x"}])
