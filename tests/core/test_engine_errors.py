"""What the Python API says of wrong arguments, closed engines, and processes that have forked."""

from __future__ import annotations

import asyncio
import copy
import inspect
import operator
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mullama.api import Engine
from mullama.errors import ConfigError, EngineDead, InvalidRequest, ShuttingDown
from mullama.files import count_of
from mullama.types import Request

CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Any]:
    return {"ctx_size": 256, "parallel": 2, "threads": 1, "batch_size": 64, "page_dir": str(tmp_path / "pages")}


@pytest.fixture
def engine(tiny_model: Callable[..., Path], small: dict[str, Any]) -> Iterator[Engine]:
    with Engine.load(tiny_model(), name="tiny", config=small) as engine:
        yield engine


# -- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [5, None, 2.5, b"abc", {"a": 1}, [1.5], [None], [[1, 2], "x", 7]])
def test_what_is_no_prompt_is_told(engine: Engine, prompt: Any) -> None:
    for call in (engine.generate, lambda one: list(engine.stream(one)), lambda one: asyncio.run(engine.agenerate(one))):
        with pytest.raises(InvalidRequest, match="a prompt is a text or a list of token ids") as caught:
            call(prompt)
        assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stop": 5}, "stop must be a text or a list of texts, got 5"),
        ({"stop": [5]}, "every text in stop"),
        ({"logit_bias": 5}, "logit_bias must be a dict from token ids to numbers, got 5"),
        ({"logit_bias": "a"}, "logit_bias must be a dict"),
        ({"lora": 5}, "lora must be an id, a list of ids, or a dict of scales"),
        ({"preempt": "never"}, "preempt must be one of auto, swap, recompute, got 'never'"),
        ({"priority": "high"}, "priority must be a whole number from -2147483648 to 2147483647, got 'high'"),
        ({"priority": 1 << 40}, "priority must be"),
        ({"user": 5}, "user must be a text, got 5"),
        ({"slo_ms": "soon"}, "slo_ms must be a number of milliseconds above 0, got 'soon'"),
        ({"slo_ms": float("nan")}, "slo_ms must be"),
        ({"temperature": None}, "temperature must be a number"),
        ({"max_tokens": "5"}, "max_tokens must be a whole number"),
    ],
)
def test_a_wrong_option_is_named(engine: Engine, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine.generate("a", **{"max_tokens": 2, **options})
    assert caught.value.message.startswith(reason)
    assert caught.value.param == next(iter(options))


def test_an_unknown_option_is_a_type_error(engine: Engine) -> None:
    with pytest.raises(TypeError, match="there is no option 'temprature'"):
        engine.generate("a", temprature=1.0)  # type: ignore[call-overload]


@pytest.mark.parametrize("messages", ["hello", None, 5, {"role": "user", "content": "x"}, b"x"])
def test_what_is_no_list_of_messages_is_told(engine: Engine, messages: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"messages must be a list of messages, as \[\{"):
        engine.chat(messages, max_tokens=2)
    with pytest.raises(InvalidRequest, match="not what JSON can hold"):
        engine.chat([{"role": "user", "content": {1, 2}}], max_tokens=2)


def test_a_request_submitted_by_hand_is_checked_as_well(engine: Engine) -> None:
    for wrong in ({"priority": "x"}, {"user": 7}, {"slo_ms": -1.0}, {"priority": True}):
        with pytest.raises(InvalidRequest, match=next(iter(wrong))):
            engine.submit_sync(Request("r", [65], **wrong))  # type: ignore[arg-type]


def test_configs(tiny_model: Callable[..., Path], small: dict[str, Any]) -> None:
    path = tiny_model()
    with Engine.load(path, config={**small, "ctx-size": 512}) as engine:
        assert engine.info.n_ctx == 512
    with pytest.raises(ConfigError, match="config: ctx_size: -5 is out of range; it must be between 0 and"):
        Engine.load(path, config={"ctx_size": -5})
    with pytest.raises(ConfigError, match="config: paralel: there is no such option; did you mean 'parallel'"):
        Engine.load(path, config={"paralel": 2})
    for wrong in ("ctx_size=5", 5, [("ctx_size", 5)]):
        with pytest.raises(ConfigError, match="config must be a ServeConfig or a dict of its options, not"):
            Engine.load(path, config=wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="a model is named by a text or a path, not by NoneType"):
        Engine.load(None)  # type: ignore[arg-type]


# -- after close() ----------------------------------------------------------------------------------------------------


def _arguments(method: Any) -> list[Any]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in inspect.signature(method).parameters.values() if p.kind in kinds and p.default is p.empty]
    given = {"prompt": "a", "text": "a", "messages": CHAT, "messages_json": b"[]", "data": b"a", "slot": 0}
    return [given.get(p.name, [65]) for p in needed]


#: Public methods that need a running engine; what only reads what it was (info, counters) goes on.
METHODS = (
    *("generate", "agenerate", "stream", "astream", "chat", "chat_prompt", "tokenize", "detokenize", "render_chat"),
    *("prompt_tokens", "bytes_alone", "memory", "memory_report", "memory_report_sync", "kv_snapshot"),
    *("kv_snapshot_sync", "kv.atree", "kv.amap", "kv.adrop", "drop_retained", "unload_adapter", "load_adapter"),
    *("weights.sleep", "weights.wake", "weights.swap"),
)


def _call(engine: Engine, name: str) -> Any:
    method = operator.attrgetter(name)(engine)
    found = method(*_arguments(method))
    if inspect.isgenerator(found):
        return list(found)

    async def wait() -> Any:
        if inspect.isasyncgen(found):
            return [piece async for piece in found]
        return await asyncio.wait_for(found, 60)

    return asyncio.run(wait()) if inspect.iscoroutine(found) or inspect.isasyncgen(found) else found


def test_after_close_every_method_says_so(engine: Engine) -> None:
    engine.close()
    engine.close()
    for name in METHODS:
        with pytest.raises((ShuttingDown, EngineDead), match="'tiny' was closed: load it again"):
            _call(engine, name)
    for name in ("snapshot", "tree", "map", "audit", "drop"):
        with pytest.raises(EngineDead, match="'tiny' was closed"):
            getattr(engine.kv, name)()
    with pytest.raises(ShuttingDown, match="'tiny' was closed"):
        engine.submit_sync(Request("r", [65]))
    assert not engine.is_ready()
    assert engine.info.name == "tiny" and engine.counters()["steps"] == 0


# -- copies and children ----------------------------------------------------------------------------------------------


def test_an_engine_is_not_copied(engine: Engine) -> None:
    for way in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="an Engine cannot be copied"):
            way(engine)
    with pytest.raises(TypeError, match="cannot be pickled or sent to another process; load the model there"):
        pickle.dumps(engine)
    assert engine.generate("a", max_tokens=1)


FORKS = """
    import asyncio, os, sys, threading
    from mullama import Engine, Request, SamplingParams
    from mullama.errors import EngineDead

    def load():
        return Engine.load(sys.argv[1], name="tiny", config={
            "ctx_size": 256, "parallel": 2, "threads": 2, "batch_size": 64, "page_dir": sys.argv[2]})

    engine = load()
    before = engine.generate("a", max_tokens=4, temperature=0)
    running = engine.submit_sync(Request("r", [65], SamplingParams(max_tokens=200, ignore_eos=True)))
    next(running)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        calls = {
            "generate": lambda: engine.generate("a"),
            "stream": lambda: list(engine.stream("a")),
            "agenerate": lambda: asyncio.run(engine.agenerate("a")),
            "batch": lambda: engine.generate(["a", "b"]),
            "kv": lambda: engine.kv.snapshot(),
            "memory": lambda: engine.memory(),
            "policy": lambda: engine.planning.set_policy("srpt"),
            "read": lambda: next(running),
        }
        for name, call in calls.items():
            try:
                call()
                print("no error from", name)
            except EngineDead as error:
                assert "load it after the fork" in str(error) or "in another process" in str(error), error
        assert not engine.is_ready()
        assert engine.detokenize(engine.tokenize("abc")) == "abc", "what needs no thread goes on"
        running.cancel()
        engine.close()
        with load() as own:
            assert own.generate("a", max_tokens=4, temperature=0) == before
        print("child done")
        sys.exit(7)  # through the interpreter's end, where the parent's engine is let go of
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7, status
    assert len(os.listdir(sys.argv[2])) == 1, "the page is still there"
    rest = sum(delta.n_tokens for delta in running)
    assert rest > 100 and engine.generate("a", max_tokens=4, temperature=0) == before
    engine.close()
    print("parent done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_told_to_load(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """In the child every call that needs the engine raises at once; the parent's goes on as if nothing were."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORKS), str(tiny_model()), str(tmp_path / "pages")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["child done", "parent done"], done.stderr
    assert done.returncode == 0, done.stderr


def test_a_description_counts_the_parameters(engine: Engine) -> None:
    """llama.cpp names a model by its layers, "256M" for one of 135 million."""
    assert f" {count_of(engine.info.n_params)} " in engine.info.description
    assert engine.info.description.startswith("llama ")
