"""``from mullama import Engine``: the same engine without a server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mullama import Engine
from mullama.config import ServeConfig
from mullama.errors import (
    ContextLengthExceeded,
    EngineDead,
    InvalidRequest,
    ModelLoadError,
    MullamaError,
    ReferenceNotFound,
    ShuttingDown,
)

from .support import ServerProcess, clean_env, wait_until

STORY = "Once upon a time"
ASK = [{"role": "user", "content": "Why is the sky blue?"}]


def small(folder: Path, **fields: object) -> ServeConfig:
    return ServeConfig(ctx_size=512, parallel=4, threads=1, page_dir=str(folder), **fields)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine.load(smollm2, config=small(tmp_path_factory.mktemp("pages"))) as engine:
        yield engine


def test_import_does_not_load_the_core() -> None:
    """Nor do the parts that are for programs without it: the page's reader, the types, the policies."""
    code = (
        "import sys, mullama, mullama.abi, mullama.types, mullama.errors, mullama.config, mullama.scheduling;"
        "from mullama import SamplingParams, Profile, Request, __version__;"
        "loaded = [m for m in sys.modules if m.startswith('mullama._core')];"
        "sys.exit(repr(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=clean_env(), timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_generate_and_stream(engine: Engine) -> None:
    text = engine.generate(STORY, max_tokens=12, temperature=0)
    pieces = list(engine.stream(STORY, max_tokens=12, temperature=0))
    assert "".join(pieces) == text and len(pieces) > 3
    assert engine.generate(engine.tokenize(STORY), max_tokens=12, temperature=0) == text


def test_it_says_what_the_server_says(engine: Engine, server: ServerProcess) -> None:
    over_http = server.complete(STORY, max_tokens=12)["choices"][0]["text"]
    assert engine.generate(STORY, max_tokens=12, temperature=0) == over_http


def test_chat(engine: Engine) -> None:
    text = engine.chat(ASK, max_tokens=8, temperature=0)
    assert "sky" in text
    assert engine.generate(engine.chat_prompt(ASK), max_tokens=8, temperature=0) == text


def test_on_an_event_loop(engine: Engine) -> None:
    expected = engine.generate(STORY, max_tokens=12, temperature=0)

    async def main() -> None:
        assert await engine.agenerate(STORY, max_tokens=12, temperature=0) == expected
        pieces = [piece async for piece in engine.astream(STORY, max_tokens=12, temperature=0)]
        assert "".join(pieces) == expected
        both = await asyncio.gather(*(engine.agenerate(STORY, max_tokens=12, temperature=0) for _ in range(6)))
        assert both == [expected] * 6

    asyncio.run(main())
    asyncio.run(main())  # a second loop, when the first is gone
    assert engine.generate(STORY, max_tokens=12, temperature=0) == expected


def test_from_many_threads(engine: Engine) -> None:
    expected = engine.generate(STORY, max_tokens=8, temperature=0)
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda _: engine.generate(STORY, max_tokens=8, temperature=0), range(24)))
    assert texts == [expected] * 24


def test_leaving_a_stream_early_cancels(engine: Engine) -> None:
    for piece in engine.stream(STORY, ignore_eos=True):
        assert piece
        break
    wait_until(lambda: not engine.scheduler_snapshot()["running"])

    async def main() -> None:
        stream = engine.astream(STORY, ignore_eos=True)
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.agenerate(STORY, ignore_eos=True), 0.2)

    asyncio.run(main())
    wait_until(lambda: not engine.scheduler_snapshot()["running"])
    view = engine.kv_snapshot_sync()
    assert view["audit"] == [] and view["cells_running"] == 0


def test_tokenize_and_back(engine: Engine) -> None:
    for text in (STORY, "Grüße, Welt! 你好 🙂", "  spaces  ", ""):
        assert engine.detokenize(engine.tokenize(text)) == text


def test_stop_and_bias(engine: Engine) -> None:
    full = engine.generate(STORY, max_tokens=24, temperature=0)
    middle = full[8:14]
    assert engine.generate(STORY, max_tokens=24, temperature=0, stop=middle) == full[: full.index(middle)]
    (blue,) = engine.tokenize(" blue")
    assert engine.generate(STORY, max_tokens=3, temperature=0, logit_bias={blue: 100.0}) == " blue" * 3


def test_errors(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ContextLengthExceeded):
        engine.generate("word " * 1000)
    for prompt in ("", [], [-1], [10**9]):
        with pytest.raises(InvalidRequest):
            engine.generate(prompt)  # type: ignore[arg-type]
    with pytest.raises(MullamaError):
        engine.generate(STORY, temperature=-1.0)
    with pytest.raises(InvalidRequest):
        engine.generate("\ud800")
    with pytest.raises(TypeError):
        engine.generate(STORY, temprature=1.0)
    with pytest.raises((ModelLoadError, ReferenceNotFound)):
        Engine.load(tmp_path / "nothing.gguf")
    assert engine.generate(STORY, max_tokens=2)


def own(what: str) -> int:
    """How many of them this process has."""
    return len(list(Path(f"/proc/self/{what}").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="counts what the process holds through /proc")
def test_a_closed_engine_leaves_nothing(smollm2: Path, tmp_path: Path) -> None:
    def one_life() -> None:
        with Engine.load(smollm2, config=ServeConfig(ctx_size=256, parallel=2, page_dir=str(tmp_path))) as engine:
            assert len(list(tmp_path.glob("*.page"))) == 1
            assert engine.generate(STORY, max_tokens=4)
            asyncio.run(engine.agenerate(STORY, max_tokens=4))
        assert list(tmp_path.glob("*.page")) == []

    one_life()  # what the first engine of a process sets up for good
    names, native, fds = {t.name for t in threading.enumerate()}, own("task"), own("fd")
    for _ in range(3):
        one_life()
    assert {t.name for t in threading.enumerate()} <= names
    wait_until(lambda: own("task") <= native)
    assert own("fd") <= fds


def test_closing_ends_what_runs(smollm2: Path, tmp_path: Path) -> None:
    engine = Engine.load(smollm2, config=small(tmp_path))
    stream = engine.stream(STORY, ignore_eos=True)
    assert next(stream)
    engine.close()
    with pytest.raises((ShuttingDown, EngineDead)):
        for _ in stream:
            pass
    engine.close()
    with pytest.raises(MullamaError):
        engine.generate(STORY)
