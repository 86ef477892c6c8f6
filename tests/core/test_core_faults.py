"""What goes wrong fails one request, or waits; never the others, never the process."""

from __future__ import annotations

import math
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from core_support import Driver, greedy, sampled

from mullama import abi
from mullama._core import Core, Model
from mullama.types import SamplingParams

PROMPTS = ["first of three", "the second prompt", "and number three"]
WIDE = ((tiny.WIDE_TOKEN, 1000.0),)  # 400 bytes of text a token


@pytest.mark.parametrize("params", [greedy, sampled], ids=["greedy", "sampled"])
@pytest.mark.parametrize("moment", ["the first token", "a later token"])
def test_logits_that_are_not_finite_fail_that_request_only(
    core: Driver, params: Callable[..., SamplingParams], moment: str
) -> None:
    expected = [core.generate(prompt, params(20)).tokens for prompt in PROMPTS]
    handles = [core.open(prompt, params(20), slot=slot) for slot, prompt in enumerate(PROMPTS)]
    if moment == "a later token":
        core.prefill()
        core.step(5)
    core.core.inject_nan(1)
    core.finish_all(retain=True)
    outputs = [core.outputs[handle] for handle in handles]
    assert [output.reason for output in outputs] == ["length", "error", "length"]
    assert outputs[1].error == 1
    assert outputs[1].tokens == expected[1][: len(outputs[1].tokens)]
    assert [outputs[0].tokens, outputs[2].tokens] == [expected[0], expected[2]]
    assert core.core.states() == [abi.RETAINED, abi.FREE, abi.RETAINED, abi.FREE], "poisoned KV is not kept"
    assert core.core.counters_dict()["failed"] == 1
    assert core.generate(PROMPTS[1], params(20), slot=1).tokens == expected[1], "the slot is as good as new"


def test_nothing_left_to_choose_fails_that_request_only(core: Driver) -> None:
    everything = tuple((token, -math.inf) for token in range(tiny.N_VOCAB))
    output = core.generate("x", greedy(3, logit_bias=everything))
    assert output.reason in ("length", "error")
    assert core.generate(PROMPTS[0], greedy(3)).reason == "length"


def fill_ring(driver: Driver, left: int) -> None:
    """Generate without reading until less than ``left`` bytes of the ring are free; the request in slot 0 goes on."""
    while True:
        used, capacity = driver.core.ring_usage()
        if capacity - used < left:
            return
        state = driver.core.states()[0]
        if state == abi.DONE:
            driver.core.close_slot(0, retain=False)
        if state != abi.DECODE:
            driver.open("HELLO", greedy(5000, logit_bias=WIDE))
            driver.core.run([], [(0, 5)])
        else:
            driver.core.run([0], [], 1)


def test_a_full_ring_stalls_and_loses_nothing(make_core: Callable[..., Driver], model: Model) -> None:
    driver = make_core(model, n_ctx=4096, n_slots=1)
    driver.open("HELLO", greedy(3000, logit_bias=WIDE))
    driver.prefill()
    runner = threading.Thread(target=lambda: driver.core.run([0], []))
    runner.start()
    reader = abi.Reader(driver.core.page.buffer())
    used, capacity = driver.core.ring_usage()
    while capacity - used >= tiny.WIDE_TOKEN_BYTES:
        time.sleep(0.001)
        used, capacity = driver.core.ring_usage()
    for _ in range(4):  # steps that have ended wake the reader too, but only who waits does it again and again
        assert select.select([driver.core.wake_fd()], [], [], 60)[0]
        os.read(driver.core.wake_fd(), 8)
    tokens = reader.counters().sampled_tokens
    time.sleep(0.005)
    assert reader.counters().sampled_tokens - tokens <= 2, "it waits"
    assert runner.is_alive()
    while runner.is_alive():
        driver.read_records(driver.core.drain_records())
    runner.join()
    driver.finish_all()
    output = driver.outputs[1]
    assert output.text == "B" * tiny.WIDE_TOKEN_BYTES * 3000
    assert sum(n for _, n in output.deltas) == 3000
    counters = driver.core.counters_dict()
    assert counters["ring_stalls"] >= 1 and counters["ring_stall_ns"] > 0
    assert any(abi.SITES[event.kind] == "RING_STALL" for event in reader.events())


def test_the_wake_up_stays_on_until_all_is_read(core: Driver) -> None:
    import select

    core.open("HELLO", greedy(30))
    core.core.run([], [(0, 5)])
    core.core.run([0], [])
    fd = core.core.wake_fd()
    n = 0
    while select.select([fd], [], [], 0)[0]:
        records = core.core.drain_records(7)
        core.read_records(records)
        n += len(records)
    assert n == 31
    assert core.core.drain_records() == []
    core.core.wake_reader()
    assert select.select([fd], [], [], 0)[0]
    core.finish_all()


SCRIPTS = {
    # A cancelled request's finish record has to wait for the reader, who needs the GIL.
    "cancel on a full ring": """
driver = Driver(Core(model, n_slots=1, n_ctx=4096, n_batch=64))
fill_ring(driver, 200)
def drain():
    while not done.is_set():
        driver.read_records(driver.core.drain_records())
reader = threading.Thread(target=drain)
reader.start()
driver.core.cancel(0)
done.set()
reader.join()
driver.collect()
assert list(driver.outputs.values())[-1].reason == "cancelled"
""",
    # However a rearm falls, an aborted core does not run on.
    "abort and rearm": """
driver = Driver(Core(model, n_slots=2, n_ctx=512, n_batch=64))
driver.open("HELLO")
driver.prefill()
driver.core.abort()
driver.core.rearm()
driver.core.run([0], [])
""",
    "abort ends a stall": """
driver = Driver(Core(model, n_slots=1, n_ctx=4096, n_batch=64))
fill_ring(driver, 600)
thread = threading.Thread(target=lambda: driver.core.run([0], []))
thread.start()
driver.core.abort()
thread.join()
""",
    # The context points into the model: collected in any order, it goes first.
    "a core in a cycle": """
import gc
class Node: pass
for _ in range(20):
    node = Node()
    node.self, node.core = node, Core(Model(sys.argv[1]), n_slots=2, n_ctx=512, n_batch=64)
    del node
    gc.collect()
""",
    "the last one left open": """
driver = Driver(Core(model, n_slots=1, n_ctx=512, n_batch=64))
driver.open("HELLO")
driver.prefill()
""",
    "closed twice and used": """
core = Core(model, n_slots=1, n_ctx=512, n_batch=64)
core.close()
core.close()
for use in (lambda: core.run([0], []), lambda: core.slot_info(0), lambda: core.cancel(0), lambda: core.evict(0)):
    try:
        use()
    except RuntimeError as error:
        assert "closed" in str(error)
model.close()
for use in (lambda: model.tokenize("x"), lambda: model.detokenize([1]), lambda: model.facts(), lambda: model.piece(1),
            lambda: model.render_chat(b"[]"), lambda: Core(model, n_slots=1, n_ctx=512), lambda: model.check_token(1)):
    try:
        use()
    except ModelLoadError as error:
        assert "closed" in str(error)
    else:
        raise AssertionError("a closed model was used")
""",
}

HEAD = """
import sys, threading
sys.path[:0] = sys.argv[2:]
from core_support import Driver, greedy
from mullama._core import Core, Model
from mullama.errors import ModelLoadError
from test_core_faults import fill_ring
model = Model(sys.argv[1])
done = threading.Event()
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_in_a_process_of_its_own(name: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """What would hang or crash takes nobody along."""
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", f"{HEAD}{SCRIPTS[name]}print('well')", *map(str, (tiny_model(), folder, folder.parent))],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "well\n", "")


# -- making a core


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_slots": 0, "n_ctx": 512}, "parallel must be"),
        ({"n_slots": 100_000, "n_ctx": 512}, "parallel must be"),
        ({"n_slots": 1, "n_ctx": 0}, "^n_ctx must be 16 to 16777216, got 0$"),
        ({"n_slots": 1, "n_ctx": 1 << 30}, "^n_ctx must be"),
        ({"n_slots": 1, "n_ctx": 512, "n_batch": 1}, "^n_batch must be 32 to 16384, got 1$"),
        ({"n_slots": 1, "n_ctx": 512, "n_threads": 0}, "^n_threads must be 1 to 512, got 0$"),
        ({"n_slots": 1, "n_ctx": 512, "unified_cells": 9}, "^unified_cells must be 256 to 268435456, got 9$"),
        ({"n_slots": 1, "n_ctx": 512, "page_path": "/nonexistent/folder/x.page"}, "cannot be made"),
    ],
)
def test_a_core_that_cannot_be_made_leaves_the_model_free(
    tiny_model: Callable[..., Path], options: dict[str, int], message: str
) -> None:
    from mullama.errors import ModelLoadError

    model = Model(tiny_model())
    with pytest.raises(ModelLoadError, match=message):
        Core(model, **options)  # type: ignore[arg-type]
    model.close()


def test_a_model_in_use_is_not_closed(tiny_model: Callable[..., Path]) -> None:
    model = Model(tiny_model())
    core = Core(model, n_slots=1, n_ctx=512, n_batch=64)
    with pytest.raises(RuntimeError, match="still uses"):
        model.close()
    core.close()
    model.close()


def test_close_gives_the_descriptors_back(model: Model, tmp_path: Path) -> None:
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("needs /proc")
    before = len(list(folder.iterdir()))
    cores = [Core(model, n_slots=1, n_ctx=512, n_batch=64, page_path=str(tmp_path / f"{i}.page")) for i in range(5)]
    assert len(list(folder.iterdir())) > before
    for core in cores:
        core.close()
    assert len(list(folder.iterdir())) == before
    assert list(tmp_path.iterdir()) == []
