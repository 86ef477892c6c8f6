"""The chat without a terminal: the session, the loop of lines and commands, Ctrl-C."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import FakeEngine

from mullama.cli.interrupt import on_interrupt
from mullama.cli.settings import SETTINGS, parse_setting
from mullama.cli.talk.chat import ChatSession
from mullama.cli.talk.repl import COMMANDS, Repl, gauge
from mullama.errors import ComputeFailed, ContextLengthExceeded, EngineDead, InvalidRequest
from mullama.types import FinishReason, SamplingParams


def session(engine: FakeEngine | None = None, **kwargs: object) -> ChatSession:
    return ChatSession(engine or FakeEngine(), **kwargs)  # type: ignore[arg-type]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_turn_streams_and_is_remembered() -> None:
    engine = FakeEngine()
    chat = session(engine, system="be brief")
    assert list(chat.ask("hi")) == ["Hello", ", ", "wörld"]
    list(chat.ask("ä"))
    assert json.loads(engine.messages[1]) == [
        {"role": "system", "content": "be brief"},
        user("hi"),
        assistant("Hello, wörld"),
        user("ä"),
    ]
    assert chat.last is not None
    assert chat.last.reason is FinishReason.STOP
    assert len({request.id for request in engine.requests}) == 2


def test_settings_become_sampling_params() -> None:
    engine = FakeEngine()
    chat = session(engine, settings={"temperature": 0.0, "max_tokens": 10**9, "seed": 7, "top_k": 10**9})
    list(chat.ask("hi"))
    expected = SamplingParams(temperature=0.0, max_tokens=10**9, seed=7, top_k=engine.info.n_vocab)
    assert engine.requests[0].sampling == expected
    assert session().sampling() == SamplingParams()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("temperature", "hot", "not a number"), ("top-k", "1.5", "whole number"), ("top_p", "2", "between 0 and 1"),
     ("temperature", "nan", "between 0 and 2"), ("wings", "2", "no setting 'wings'"), ("seed", "inf", "whole")],
)  # fmt: skip
def test_wrong_settings(name: str, value: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_setting(name, value)


def test_settings_are_fields_of_the_sampling_params() -> None:
    assert set(SETTINGS) <= set(SamplingParams.__dataclass_fields__)


def test_cancelling_keeps_what_came() -> None:
    engine = FakeEngine()
    chat = session(engine)
    engine.before_piece = lambda n: chat.cancel() if n == 1 else None
    assert list(chat.ask("hi")) == ["Hello"]
    assert chat.was_cancelled
    assert chat.turns == [user("hi"), assistant("Hello")]
    engine.before_piece = None
    assert "".join(chat.ask("again")) == "Hello, wörld"
    assert not chat.was_cancelled


def test_cancelling_before_the_first_text_forgets_the_turn() -> None:
    engine = FakeEngine()
    chat = session(engine)
    render = engine.render_chat

    def render_and_cancel(messages_json: bytes, *, add_generation_prompt: bool = True) -> str:
        chat.cancel()
        return render(messages_json)

    engine.render_chat = render_and_cancel  # type: ignore[method-assign]
    assert list(chat.ask("hi")) == []
    assert chat.turns == []


def test_a_reader_who_goes_away_cancels() -> None:
    chat = session()
    reply = chat.ask("hi")
    assert next(reply) == "Hello"
    reply.close()  # type: ignore[attr-defined]
    assert chat.turns == [user("hi"), assistant("Hello")]


def test_errors_forget_the_turn() -> None:
    engine = FakeEngine()
    chat = session(engine)
    engine.refusal = ContextLengthExceeded("too long")
    with pytest.raises(ContextLengthExceeded):
        list(chat.ask("hi"))
    engine.refusal, engine.failure = None, RuntimeError("boom")
    with pytest.raises(ComputeFailed, match="boom"):
        list(chat.ask("hi"))
    with pytest.raises(InvalidRequest, match="UTF-8"):
        list(chat.ask("\udcff"))
    assert chat.turns == []


class Lines:
    """Plays a user: each line typed in turn, then Ctrl-D. An exception class stands for its key."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines: Iterator[str | type[BaseException]] = iter(lines)
        self.prompts: list[str] = []

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        line = next(self._lines, EOFError)
        if isinstance(line, str):
            return line
        raise line


def play(chat: ChatSession, *lines: str | type[BaseException]) -> str:
    out: list[str] = []
    Repl(chat, Lines(*lines), out.append).run()
    return "".join(out)


def test_a_chat_from_hello_to_ctrl_d() -> None:
    chat = session()
    out = play(chat, "hi", "", "  ", "again")
    assert out.count("Hello, wörld\n") == 2
    assert len(chat.turns) == 4


def test_several_lines_between_fences() -> None:
    chat = session()
    play(chat, '"""one', "  two", 'three"""', '"""/help"""', '"""', "/exit", '"""', '""""""')
    assert [turn["content"] for turn in chat.turns if turn["role"] == "user"] == ["one\n  two\nthree", "/help", "/exit"]


def test_ctrl_c_twice_at_the_prompt_leaves() -> None:
    chat = session()
    out = play(chat, KeyboardInterrupt, KeyboardInterrupt, "never asked")
    assert out.count("Ctrl-C again, Ctrl-D or /exit leaves") == 1
    assert chat.turns == []
    play(chat, KeyboardInterrupt, "", KeyboardInterrupt, "asked")
    assert [turn["content"] for turn in chat.turns] == ["asked", "Hello, wörld"], "not twice in a row"


def test_the_context_fills() -> None:
    chat = session()
    assert chat.context == (0, chat.engine.info.n_ctx)
    list(chat.ask("hi"))
    assert chat.last is not None
    profile = chat.last.profile
    profile.prompt_tokens, profile.completion_tokens = 1000, 24
    used, size = chat.context
    assert used == min(1024, size)
    chat.clear()
    assert chat.context[0] == 0
    assert gauge(512, 4096) == "██" + "░" * 18 + " 512 of 4,096 tokens (12%)"
    assert gauge(4096, 4096).startswith("█" * 20 + " 4,096")


def test_what_is_no_reply_has_its_colour() -> None:
    out: list[str] = []
    Repl(session(), Lines("/nosuch", "/set x 1", "hi"), out.append, lambda kind, text: f"<{kind}>{text}</>").run()
    text = "".join(out)
    assert "<note>there is no command /nosuch; /help lists them</>\n" in text
    assert "<error>error: " in text
    assert "Hello, wörld\n" in text, "a reply is plain"


def test_ctrl_c_at_the_prompt_and_within_fences_asks_again() -> None:
    chat = session()
    out = play(chat, KeyboardInterrupt, '"""half', KeyboardInterrupt, "hi")
    assert out.count("Ctrl-D or /exit leaves") == 2
    assert [turn["content"] for turn in chat.turns] == ["hi", "Hello, wörld"]


@pytest.mark.parametrize("command", ["/exit", "/quit", "/bye", "/EXIT"])
def test_leaving(command: str) -> None:
    chat = session()
    play(chat, command, "never asked")
    assert chat.turns == []


def test_commands(tmp_path: Path) -> None:
    chat = session()
    saved = tmp_path / "chat.json"
    out = play(
        chat, "/help", "/system be brief", "/set temperature 0.5", "/set seed x", "/set", "hi", "/show",
        f"/save {saved}", "/save", f"/save {tmp_path}/no/such/folder", "/nosuch", "/clear", "/system",
    )  # fmt: skip
    assert all(name in out for name in COMMANDS)
    assert "temperature is 0.5" in out
    assert "error: seed: 'x' is not a whole number" in out
    assert "error: /set needs NAME and VALUE" in out
    assert "temperature 0.5, top_k 40" in out
    assert "4 generated at 400.0 tokens/s" in out
    assert "there is no command /nosuch" in out
    assert out.count("error: /save needs a FILE") == 1
    assert "error: cannot write" in out
    assert json.loads(saved.read_text("utf-8")) == {
        "model": "fake",
        "settings": {"temperature": 0.5},
        "messages": [{"role": "system", "content": "be brief"}, user("hi"), assistant("Hello, wörld")],
    }
    assert (chat.turns, chat.system, chat.settings) == ([], None, {"temperature": 0.5})


def test_an_error_does_not_end_the_chat_but_a_dead_engine_does() -> None:
    engine = FakeEngine()
    chat = session(engine)
    engine.refusal = ContextLengthExceeded("too long")
    assert "error: too long (/clear starts a new conversation" in play(chat, "hi")
    engine.refusal = EngineDead("the engine stopped")
    with pytest.raises(EngineDead):
        play(chat, "hi")


def test_a_model_cannot_steer_the_terminal() -> None:
    engine = FakeEngine(("a\x1b[2Jb\r\x9b", "tab\tnew\nline é 👩\u200d💻"))
    out = play(session(engine), "hi")
    assert "\x1b" not in out
    assert "\x9b" not in out
    assert "a\ufffd[2Jb\ufffd\ufffdtab\tnew\nline é 👩\u200d💻" in out


def test_ctrl_c_stops_the_reply_and_not_the_program() -> None:
    engine = FakeEngine()
    chat = session(engine)
    engine.before_piece = lambda n: signal.raise_signal(signal.SIGINT) if n == 1 else None
    before = signal.getsignal(signal.SIGINT)
    out = play(chat, "hi", "/show")
    assert "Hello (stopped)\n" in out or "Hello, (stopped)\n" in out or "Hello,  (stopped)\n" in out
    assert "turns     1" in out
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_ctrl_c_raises() -> None:
    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt), on_interrupt(lambda: calls.append(1)):
        signal.raise_signal(signal.SIGINT)
        assert calls == [1]
        signal.raise_signal(signal.SIGINT)
    assert calls == [1]
