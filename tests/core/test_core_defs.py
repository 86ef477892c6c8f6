"""Every public ``def`` of the compiled modules is called, so that a wrong attribute cannot hide in one until a user
finds it. The list is made by introspection: a new ``def`` without a call here fails the test.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import adapters as lora
import pytest

import mullama._core
from mullama import abi
from mullama._core import (
    Adapter,
    Arbiter,
    Carrier,
    Cells,
    Context,
    Core,
    Divergence,
    Embedder,
    Governor,
    Model,
    Page,
    Parked,
    Sampling,
    Vacancy,
)
from mullama._core.chat.parsing import AnswerFormat, AnswerParser
from mullama._core.kernels import products as kernels
from mullama._core.testing.gate import StopText
from mullama.errors import ModelLoadError
from mullama.types import Pooling, SamplingParams

MODULES = [m.name for m in pkgutil.walk_packages(mullama._core.__path__, "mullama._core.")]
PLACES = {name.rpartition(".")[2]: name for name in MODULES}


def form_of(model: Model) -> AnswerFormat:
    return model.open_chat(b'[{"role":"user","content":"hi"}]')[1]


def compiled_modules() -> list[ModuleType]:
    found = [importlib.import_module(name) for name in MODULES]
    return [module for module in found if str(module.__file__).endswith((".so", ".pyd"))]


def public_defs() -> Iterator[str]:
    """``module.function`` and ``module.Class.method`` of everything public that is a def or a readable attribute."""
    for module in compiled_modules():
        short = module.__name__.rpartition(".")[2]
        for name, item in vars(module).items():
            if name.startswith("_") or getattr(item, "__module__", None) != module.__name__:
                continue
            if isinstance(item, type):
                yield f"{short}.{name}"
                yield from (f"{short}.{name}.{member}" for member in vars(item) if not member.startswith("_"))
            elif callable(item):
                yield f"{short}.{name}"


def running(core: Core) -> Core:
    core.open(0, 1, [104, 105], SamplingParams(temperature=0, ignore_eos=True, max_tokens=8))
    core.run([], [(0, 2)])
    core.run([0], [], 1)
    return core


def ended(core: Core) -> Core:
    running(core).run([0], [])
    return core


def retained(core: Core) -> Core:
    ended(core).close_slot(0)
    return core


def two_retained(core: Core) -> Core:
    """Prefixes in slots 0 and 1."""
    retained(core).exchange(0, 1)
    return retained(core)


def parked(core: Core) -> Parked:
    return running(core).preempt(0, save=True)


def refuses(function: Callable[..., Any], *arguments: Any) -> bool:
    with pytest.raises(ModelLoadError):
        function(*arguments)
    return True


def switched(carrier: Carrier) -> Carrier:
    carrier.commit()
    return carrier


def vacated(core: Core) -> Vacancy:
    vacancy = Vacancy(core)
    vacancy.leave()
    return vacancy


def refilled(core: Core) -> Vacancy:
    vacancy = vacated(core)
    vacancy.fill(core.context.like(core.model))
    return vacancy


def exchanged(adapter: Adapter) -> Adapter:
    twin = Adapter(adapter.model, adapter.path)
    adapter.exchange(twin)
    twin.close()
    return adapter


def against_itself(core: Core) -> Divergence:
    return Divergence(core.context.like(core.model), core.context.like(core.model))


def handed(core: Core) -> Core:
    """A preempted sequence that went to another core and ended there."""
    other = Core(core.model, n_slots=1, n_ctx=256, n_batch=64)
    one = running(core).preempt(0, save=False)
    core.let_go(one)
    other.take_in(one, 9)
    other.cancel_parked(one)
    assert [record[1] for record in other.drain_records()] == [9]
    other.close()
    return core


# Each gets a fresh object of its class (functions get nothing) and returns whether the result is what it should be.
def products() -> kernels.Products:
    return kernels.Products(8, 64, 5, copies=2)


CALLS: dict[str, Callable[..., bool]] = {
    "adapters.Adapter": lambda a, c: isinstance(a, Adapter),
    "adapters.Adapter.model": lambda a, c: a.model is c.model,
    "adapters.Adapter.path": lambda a, c: Path(a.path).is_file(),
    "adapters.Adapter.is_on": lambda a, c: a.is_on is True,
    "adapters.Adapter.leave": lambda a, c: a.leave() is None and a.is_on is False,
    "adapters.Adapter.exchange": lambda a, c: exchanged(a).is_on,
    "adapters.Adapter.n_bytes": lambda a, c: a.n_bytes > 0,
    "adapters.Adapter.n_host_bytes": lambda a, c: a.n_host_bytes == a.n_bytes,
    "adapters.Adapter.n_matrices": lambda a, c: a.n_matrices == 6,
    "adapters.Adapter.close": lambda a, c: a.close() is None and a.close() is None,
    "governor.Governor": lambda: Governor(2, False) is not None,
    "governor.Governor.n_cores": lambda g: g.n_cores == 2,
    "governor.Governor.n_max": lambda g: g.n_max == 2,
    "governor.Governor.threads": lambda g: g.threads == 2,
    "governor.Governor.fixed": lambda g: g.fixed is False,
    "governor.Governor.changes": lambda g: g.changes == 0,
    "governor.Governor.twin": lambda g: g.twin().snapshot() == g.snapshot(),
    "governor.Governor.threads_for": lambda g: g.threads_for() == 2,
    "governor.Governor.allowance": lambda g: g.allowance(1) == 0,
    "governor.Governor.record": lambda g: g.record(1, 2, 1000, 1000) is None,
    "governor.Governor.look": lambda g: g.look(0.5, 1000) is None and g.snapshot()["neighbour_cores"] == 0.5,
    "governor.Governor.wake": lambda g: g.wake(0.0, 2000) is None and g.snapshot()["neighbour_cores"] == 0.0,
    "governor.Governor.cost": lambda g: g.record(1, 2, 900, 1000) is None and g.cost(1) == 900,
    "governor.Governor.snapshot": lambda g: g.snapshot()["threads"] == 2,
    "arbiter.Arbiter": lambda: isinstance(Arbiter(), Arbiter),
    "arbiter.Arbiter.policy": lambda a, c: a.policy == "round_robin",
    "arbiter.Arbiter.busy_beside": lambda a, c: a.busy_beside(1, 1.0) is False,
    "arbiter.Arbiter.set_share": lambda a, c: a.seats() == {} and c.turns.set_share(c.seat) is None,
    "arbiter.Arbiter.renew": lambda a, c: a.renew() is None and a.seats() == {},
    "arbiter.Arbiter.seats": lambda a, c: a.seats() == {} and c.turns.seats()[c.seat]["turns"] > 0,
    "context.Context": lambda c: isinstance(c.context, Context),
    "context.Context.model": lambda c: c.context.model is c.model,
    "context.Context.n_slots": lambda c: c.context.n_slots == 2,
    "context.Context.embeds": lambda c: c.context.embeds is False,
    "context.Context.ranks": lambda c: c.context.ranks is False,
    "context.Context.reference": lambda c: c.context.reference is False,
    "context.Context.n_ctx": lambda c: c.context.n_ctx == 256,
    "context.Context.n_batch": lambda c: c.context.n_batch == 64,
    "context.Context.unified": lambda c: c.context.unified is False,
    "context.Context.can_shift": lambda c: c.context.can_shift is True,
    "context.Context.needs_checkpoint": lambda c: c.context.needs_checkpoint is False,
    "context.Context.token_bytes": lambda c: c.context.token_bytes == Cells(c).token_bytes,
    "context.Context.close": lambda c: c.context.like(c.model).close() is None,
    "context.Context.like": lambda c: c.context.like(c.model).n_ctx == 256,
    "context.Context.buffers": lambda c: {b[0] for b in c.context.buffers()} == {"weights", "full", "compute"},
    "context.Context.cell_bytes": lambda c: c.context.cell_bytes() == {"full": c.context.token_bytes},
    "context.Context.memory": lambda c: sum(c.context.memory()["weights"].values()) > 0,
    "divergence.Divergence": lambda c: isinstance(against_itself(c), Divergence),
    "divergence.Divergence.measure": lambda c: against_itself(c).measure([104, 105, 106], 2)[1] == 2,
    "gate.busy_ticks": lambda: mullama._core.testing.gate.busy_ticks("/proc/stat") > 0,
    "gate.kl": lambda: mullama._core.testing.gate.kl([1.0, 2.0], [1.0, 2.0]) == (0.0, True),
    "carrier.Carrier": lambda k: isinstance(k, Carrier),
    "carrier.Carrier.target": lambda k: isinstance(k.target, Context),
    "carrier.Carrier.warm": lambda k: k.warm() in (True, False),
    "carrier.Carrier.commit": lambda k: k.commit() == (0, 0) and k.finish().close() is None,
    "carrier.Carrier.finish": lambda k: switched(k).finish().close() is None,
    "carrier.Carrier.abandon": lambda k: k.abandon().close() is None,
    "vacancy.Vacancy": lambda c: isinstance(Vacancy(c), Vacancy),
    "vacancy.Vacancy.core": lambda c: Vacancy(c).core is c,
    "vacancy.Vacancy.has_left": lambda c: Vacancy(c).has_left is False and vacated(c).has_left is True,
    "vacancy.Vacancy.is_over": lambda c: refilled(c).is_over is True,
    "vacancy.Vacancy.held_ns": lambda c: Vacancy(c).held_ns > 0,
    "vacancy.Vacancy.n_bytes": lambda c: Vacancy(running(c)).n_bytes > 0,
    "vacancy.Vacancy.leave": lambda c: vacated(c).core.is_vacant,
    "vacancy.Vacancy.fill": lambda c: refilled(running(c)).core.states() == [abi.DECODE, abi.FREE],
    "products.layouts": lambda: isinstance(kernels.layouts(), list),
    "products.set_kernel": lambda: kernels.set_kernel(8, 0, "auto") is None,
    "products.allow_layout": lambda: kernels.allow_layout(8, "no such layout", True) is False,
    "products.set_attention": lambda: kernels.set_attention(True) is None,
    "products.has_attention": lambda: kernels.has_attention() in (True, False),
    "products.check_attention": lambda: kernels.check_attention(40, 1, 1)[0] is True,
    "products.counts": lambda: set(kernels.counts()) == set(kernels.COUNTED),
    "products.weights_by_layout": lambda model: any(size for size in kernels.weights_by_layout(model).values()),
    "products.Products": lambda: isinstance(products(), kernels.Products),
    "products.Products.can": lambda: products().can(3) is True,
    "products.Products.check": lambda: products().check(products(), 3) == (True, True, 0.0),
    "products.Products.is_steady": lambda: products().is_steady(3, 2) == (True, True),
    "products.Products.time": lambda: products().time(1, 1, 2, 1) > 0,
    "quantization.quantize_types": lambda: "Q4_0" in mullama._core.quantize_types(),
    "quantization.quantize": lambda: refuses(mullama._core.quantize, "/no/file", "/no/where", "Q4_0"),
    "page.Page": lambda: Page(1) is not None,
    "page.Page.path": lambda p: p.path == "",
    "page.Page.buffer": lambda p: abi.Reader(p.buffer()).header.n_rows == 2,
    "page.Page.close": lambda p: p.close() is None,
    "page.layout": lambda: len(mullama._core.output.page.layout()) > 50,
    "page.block_sizes": lambda: set(mullama._core.output.page.block_sizes()) == {"header", "counters", "row", "event"},
    "page.site_table": lambda: "OPEN" in mullama._core.output.page.site_table(),
    "model.init_backend": lambda: mullama._core.model.model.init_backend() is None,
    "model.set_log_level": lambda: mullama._core.set_log_level("none") is None,
    "model.chat_template_names": lambda: "llama3" in mullama._core.chat_template_names(),
    "model.devices": lambda: any(d["type"] == "cpu" for d in mullama._core.devices()),
    "model.system_info": lambda: "CPU" in mullama._core.system_info(),
    "model.llama_cpp_version": lambda: bool(mullama._core.llama_cpp_version()),
    "model.Model": lambda m: isinstance(m, Model),
    "model.Model.path": lambda m: Path(m.path).is_file(),
    "model.Model.n_vocab": lambda m: m.n_vocab > 256,
    "model.Model.vocab_only": lambda m: m.vocab_only is False,
    "model.Model.close": lambda m: m.close() is None and m.close() is None,
    "model.Model.facts": lambda m: m.facts()["architecture"] == "llama",
    "model.Model.metadata": lambda m: m.metadata()["general.name"] == "tiny-llama",
    "model.Model.vocab_digest": lambda m: len(m.vocab_digest()) == 64,
    "model.Model.vocab_facts": lambda m: m.vocab_facts()["byte_tokens"] == list(range(256)),
    "model.Model.check_token": lambda m: m.check_token(5) == 5,
    "model.Model.tokenize": lambda m: m.tokenize("hi") == [104, 105],
    "model.Model.control_tokens": lambda m: isinstance(m.control_tokens(), list),
    "model.Model.detokenize": lambda m: m.detokenize([104, 105]) == "hi",
    "model.Model.detokenize_bytes": lambda m: m.detokenize_bytes([104, 105]) == b"hi",
    "model.Model.piece": lambda m: m.piece(104) == b"h",
    "model.Model.render_chat": lambda m: "hi" in m.render_chat(b'[{"role":"user","content":"hi"}]'),
    "model.Model.twin": lambda m: m.twin().close() is None,
    "model.Model.n_twins": lambda m: m.n_twins == 1,
    "model.Model.is_open": lambda m: m.is_open is True,
    "model.Model.open_chat": lambda m: "hi" in m.open_chat(b'[{"role":"user","content":"hi"}]')[0],
    "model.Model.chat_caps": lambda m: "supports_tools" in m.chat_caps(),
    "parsing.AnswerFormat": lambda m: isinstance(form_of(m), AnswerFormat),
    "parsing.AnswerFormat.facts": lambda m: form_of(m).facts["stops"] == [],
    "parsing.AnswerFormat.parser": lambda m: isinstance(form_of(m).parser(), AnswerParser),
    "parsing.AnswerParser": lambda m: isinstance(form_of(m).parser(), AnswerParser),
    "parsing.AnswerParser.feed": lambda m: form_of(m).parser().feed("hi") == [("content", 0, "hi", "")],
    "parsing.AnswerParser.finish": lambda m: form_of(m).parser().finish() == [],
    "parsing.AnswerParser.size": lambda m: form_of(m).parser().size > 0,
    "parsing.AnswerParser.contradictions": lambda m: form_of(m).parser().contradictions == 0,
    "model.Model.chat_template": lambda m: "messages" in m.chat_template(),
    "chain.check_params": lambda: mullama._core.check_params(SamplingParams()) is None,
    "chain.Breaker": lambda: mullama._core.sampling.chain.Breaker() is not None,
    "chain.BreakerTable": lambda: mullama._core.sampling.chain.BreakerTable() is not None,
    "chain.Sampling": lambda m: Sampling(m, SamplingParams()) is not None,
    "chain.Sampling.model": lambda m: Sampling(m, SamplingParams()).model is m,
    "chain.Sampling.breaker_sequences": lambda m: Sampling(m, SamplingParams()).breaker_sequences == [],
    "gate.scan": lambda: mullama._core.testing.gate.scan([1.0, 3.0, 2.0]) == 1,
    "gate.StopText": lambda: StopText(["x"]) is not None,
    "gate.StopText.ended_by": lambda t: t.ended_by == -1,
    "gate.StopText.begin": lambda t: t.begin("é".encode()[:1]) is None,
    "gate.StopText.push": lambda t: t.push(b"abc") == (b"abc", -1),
    "gate.StopText.flush": lambda t: t.flush() == b"",
    "parking.Parked": lambda c: isinstance(parked(c), Parked),
    "parking.Parked.saved": lambda c: parked(c).saved is True,
    "parking.Parked.n_bytes": lambda c: parked(c).n_bytes == c.parked_bytes(),
    "parking.Parked.tokens": lambda c: parked(c).tokens()[:2] == [104, 105],
    "parking.Parked.left": lambda c: parked(c).left() == 0,
    "core.Core.preempt": lambda c: parked(c).saved and c.states() == [abi.FREE, abi.FREE],
    "core.Core.resume": lambda c: c.resume(1, parked(c)) is None and c.states() == [abi.FREE, abi.DECODE],
    "core.Core.cancel_parked": lambda c: c.cancel_parked(parked(c)) is None and c.parked_bytes() == 0,
    "core.Core.damage_parked": lambda c: c.damage_parked(parked(c)) is None,
    "core.Core.let_go": lambda c: handed(c).counters_dict()["parked"] == 0,
    "core.Core.drop_saved": lambda c: c.drop_saved(parked(c)) is None and c.parked_bytes() == 0,
    "core.Core.is_vacant": lambda c: c.is_vacant is False and vacated(c).core.is_vacant is True,
    "core.Core.is_switching": lambda c: c.is_switching() is False,
    "core.Core.take_in": lambda c: handed(c).audit() == [],
    "embedder.Embedder": lambda e: isinstance(e, Embedder),
    "embedder.Embedder.context": lambda e: e.context.embeds,
    "embedder.Embedder.model": lambda e: isinstance(e.model, Model),
    "embedder.Embedder.governor": lambda e: isinstance(e.governor, Governor),
    "embedder.Embedder.turns": lambda e: isinstance(e.turns, Arbiter),
    "embedder.Embedder.page": lambda e: isinstance(e.page, Page),
    "embedder.Embedder.n_ctx": lambda e: e.n_ctx == 64,
    "embedder.Embedder.n_batch": lambda e: e.n_batch == 64,
    "embedder.Embedder.n_slots": lambda e: e.n_slots == 16,
    "embedder.Embedder.n_embd": lambda e: e.n_embd == 64,
    "embedder.Embedder.seat": lambda e: e.seat in e.turns.seats(),
    "embedder.Embedder.can_shift": lambda e: e.can_shift is False,
    "embedder.Embedder.unified": lambda e: e.unified is True,
    "embedder.Embedder.run": lambda e: len(e.run([([104, 105], Pooling.LAST, True)])[0]) == 64 * 4,
    "embedder.Embedder.pause": lambda e: e.pause() is None,
    "embedder.Embedder.interrupt": lambda e: e.interrupt() is None,
    "embedder.Embedder.abort": lambda e: e.abort() is None,
    "embedder.Embedder.note_opened": lambda e: e.note_opened(1) is None,
    "embedder.Embedder.note_cancelled": lambda e: e.note_cancelled(1) is None,
    "embedder.Embedder.note_idle": lambda e: e.note_idle(5, 0) is None,
    "embedder.Embedder.memory": lambda e: sum(e.memory()["weights"].values()) > 0,
    "embedder.Embedder.inject_nan": lambda e: e.inject_nan(0) is None and e.run([([5], Pooling.LAST, True)]) == [None],
    "embedder.Embedder.close": lambda e: e.close() is None,
    "core.Core.context": lambda c: c.context.model is c.model,
    "core.Core.turns": lambda c: isinstance(c.turns, Arbiter),
    "core.Core.seat": lambda c: c.seat in c.turns.seats(),
    "core.Core.memory": lambda c: sum(c.memory()["kv"].values()) > 0,
    "core.Core.slot_fill": lambda c: running(c).slot_fill(0) == (3, 4),
    "core.Core.steps_done": lambda c: running(c).steps_done() == 2,
    "core.Core.parked_bytes": lambda c: c.parked_bytes() == 0,
    "core.Core": lambda c: isinstance(c, Core),
    "grammars.library": lambda: mullama._core.constraint_library()["problem"] is None,
    "grammars.Grammar": lambda: mullama._core.constraint.grammars.Grammar() is not None,
    "grammars.Vocabulary": lambda: mullama._core.constraint.grammars.Vocabulary() is not None,
    "loop.Loop": lambda: mullama._core.core.loop.Loop() is not None,
    "core.Core.model": lambda c: isinstance(c.model, Model),
    "core.Core.page": lambda c: isinstance(c.page, Page),
    "core.Core.governor": lambda c: isinstance(c.governor, Governor),
    "core.Core.n_slots": lambda c: c.n_slots == 2,
    "core.Core.n_ctx": lambda c: c.n_ctx == 256,
    "core.Core.n_batch": lambda c: c.n_batch == 64,
    "core.Core.close": lambda c: c.close() is None and c.close() is None,
    "core.Core.note_plan": lambda c: c.note_plan(100, 3, 1, 2) is None and c.counters_dict()["waiting"] == 3,
    "core.Core.refresh_page": lambda c: (
        c.refresh_page(3) is None and abi.Reader(c.page.buffer()).counters().waiting == 3
    ),
    "core.Core.note_idle": lambda c: c.note_idle(100, 2) is None and c.counters_dict()["waiting"] == 2,
    "core.Core.counters_dict": lambda c: running(c).counters_dict()["running"] == 1,
    "core.Core.wake_fd": lambda c: c.wake_fd() >= 0,
    "core.Core.drain_records": lambda c: len(running(c).drain_records()) == 2,
    "core.Core.wake_reader": lambda c: c.wake_reader() is None,
    "core.Core.interrupt": lambda c: c.interrupt() is None,
    "core.Core.rearm": lambda c: c.rearm() is None,
    "core.Core.abort": lambda c: c.abort() is None,
    "core.Core.pause": lambda c: running(c).pause() is None and c.pause() is None,
    "core.Core.states": lambda c: running(c).states() == [abi.DECODE, abi.FREE],
    "core.Core.progress": lambda c: running(c).progress() == [(abi.DECODE, 2, 3), (abi.FREE, 0, 0)],
    "core.Core.retained": lambda c: retained(c).retained(0) == (9, 8) and c.retained(1) == (0, 0),
    "core.Core.gap_cost_ns": lambda c: running(c).gap_cost_ns(0) >= 0,
    "core.Core.slot_info": lambda c: running(c).slot_info(0)[:3] == (abi.DECODE, 1, 3),
    "core.Core.open": lambda c: running(c) is c,
    "core.Core.cancel": lambda c: running(c).cancel(0) is None and c.states()[0] == abi.FREE,
    "core.Core.close_slot": lambda c: ended(c).close_slot(0, retain=False) == 0,
    "core.Core.evict": lambda c: retained(c).evict(0) == 9 and c.evict(0) == 0,
    "core.Core.exchange": lambda c: running(c).exchange(0, 1) > 0 and c.states() == [abi.FREE, abi.DECODE],
    "core.Core.run": lambda c: c.run([], []) is False and running(c).run([0], []) is True,
    "core.Core.cells": lambda c: running(c).cells()["used"] == [3, 0],
    "core.Core.audit": lambda c: running(c).audit() == [],
    "core.Core.state_bytes": lambda c: running(c).state_bytes(0) > c.state_bytes(1),
    "core.Core.inject_nan": lambda c: c.inject_nan(0) is None,
    "core.Core.unified": lambda c: c.unified is False,
    "core.Core.kv_cells": lambda c: c.kv_cells == 512,
    "core.Core.kv_costs": lambda c: set(c.kv_costs()) == {"save", "restore", "copy"},
    "core.Core.note_evicted": lambda c: c.note_evicted(5) is None and c.counters_dict()["kv_evict_tokens"] == 5,
    "core.Core.packed": lambda c: running(c).packed(0)[:8] == bytes([104, 0, 0, 0, 105, 0, 0, 0]),
    "core.Core.cell_runs": lambda c: running(c).cell_runs(0) == [(0, 3, 0), (3, 253, -1)],
    "core.Core.drop_adapters": lambda c: running(c).drop_adapters() is None,
    "core.Core.shifted": lambda c: running(c).shifted(0) == 0,
    "core.Core.can_shift": lambda c: c.can_shift is True,
    "cells.Cells": lambda c: isinstance(c, Cells),
    "cells.Cells.core": lambda c: isinstance(c.core, Core),
    "cells.Cells.token_bytes": lambda c: c.token_bytes == 2 * 2 * 32 * 2,
    "cells.Cells.has_rows": lambda c: c.has_rows is True,
    "cells.Cells.needs_checkpoint": lambda c: c.needs_checkpoint is False,
    "cells.Cells.can_store": lambda c: c.can_store is True,
    "cells.Cells.save": lambda c: len(Cells(retained(c.core)).save(0, 0, 9)[0]) == 9 * c.token_bytes,
    "cells.Cells.extend": lambda c: c.extend(1, [1], [bytes(c.token_bytes)]) and c.core.retained(1)[0] == 1,
    "cells.Cells.copy": lambda c: Cells(retained(c.core)).copy(0, 1, 4) and c.core.retained(1)[0] == 4,
    "cells.Cells.trim": lambda c: Cells(retained(c.core)).trim(0, 4) == 4,
    "cells.Cells.can_cut": lambda c: Cells(retained(c.core)).can_cut(0, 4) is True,
    "cells.Cells.checkpoint": lambda c: Cells(retained(c.core)).checkpoint(0) == b"",
    "cells.Cells.layers": lambda c: len(c.layers()) == 2,
    "core.Core.staging_bytes": lambda c: (
        c.staging_bytes() == 0 < two_retained(c).exchange(0, 1) and c.staging_bytes() > 0
    ),
    "core.Core.ring_usage": lambda c: 0 < running(c).ring_usage()[0] < c.ring_usage()[1],
}


def test_there_are_compiled_modules() -> None:
    assert {m.__name__.rpartition(".")[2] for m in compiled_modules()} == {
        "adapters",
        "arbiter",
        "carrier",
        "cells",
        "chain",
        "context",
        "core",
        "divergence",
        "embedder",
        "gate",
        "governor",
        "grammars",
        "loop",
        "model",
        "page",
        "parking",
        "parsing",
        "products",
        "quantization",
        "vacancy",
    }


def test_every_public_def_has_a_call() -> None:
    assert sorted(public_defs()) == sorted(CALLS), "give the new def a call in CALLS"


@pytest.fixture
def subject(
    tiny_model: Callable[..., Path], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[Any, ...]]:
    kind = request.param.split(".")[1]
    embedder = None
    on_core = ("Core", "Parked", "Cells", "Context", "Carrier", "Arbiter", "Vacancy", "Adapter", "Divergence")
    on_model = ("Model", "Sampling", "AnswerFormat", "AnswerParser", "weights_by_layout", "Embedder")
    model = Model(tiny_model()) if kind in (*on_model, *on_core) else None
    core = Core(model, n_slots=2, n_ctx=256, n_batch=64) if kind in on_core else None
    arguments: dict[str, tuple[Any, ...]] = dict.fromkeys(on_model, (model,))
    arguments["Parked"] = (core,)
    arguments["Core"] = (core,)
    if core is not None:
        arguments["Cells"] = (Cells(core),)
        arguments["Context"] = arguments["Vacancy"] = arguments["Divergence"] = (core,)
        if kind == "Carrier":
            arguments["Carrier"] = (Carrier(core, core.context.like(core.model)),)
    if kind == "Embedder" and model is not None:
        embedder = Embedder(model, n_ctx=64)
        arguments["Embedder"] = (embedder,)
    adapter = Adapter(model, lora.build(tmp_path / "a.gguf", tiny_model())) if kind == "Adapter" else None
    arguments["Adapter"] = (adapter, core)
    if request.param.count(".") == 2:
        arguments |= {
            "Arbiter": (Arbiter(), core),
            "Governor": (Governor(2),),
            "Page": (Page(2),),
            "StopText": (StopText(),),
        }
    yield arguments.get(kind, ())
    if core is not None:
        core.close()
    if embedder is not None:
        embedder.close()
    if adapter is not None:
        adapter.close()
    if model is not None:
        model.close()


@pytest.mark.parametrize(("name", "subject"), [(name, name) for name in CALLS], indirect=["subject"], ids=list(CALLS))
def test_call(name: str, subject: tuple[Any, ...]) -> None:
    assert CALLS[name](*subject)


def test_the_package_exports_what_it_says() -> None:
    for name in mullama._core.__all__:
        assert hasattr(mullama._core, name)


def test_every_def_has_a_docstring() -> None:
    missing = []
    for name in public_defs():
        module, *path = name.split(".")
        item: Any = importlib.import_module(PLACES[module])
        for part in path:
            item = getattr(item, part)
        _signature, _, text = str(item.__doc__ or "").partition("\n")  # embedsignature puts the signature first
        if callable(item) and not isinstance(item, type) and not text.strip():
            missing.append(name)
    assert missing == ["model.llama_cpp_version"], "only this one's name says everything"
