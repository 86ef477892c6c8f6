"""An engine without a model, shaped like ``EngineClient``: it replies with given pieces of text, one a "step".

One token a character: its id is the code point modulo the vocabulary; the beginning-of-sequence token is 1.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mullama.engine.client import AnswerForm, AnswerPart, OpenedChat
from mullama.engine.requests.generation import AsyncGeneration
from mullama.errors import AdapterNotFound, ContextLengthExceeded, InvalidRequest, ShuttingDown
from mullama.kv.events import KvEvent, KvEventKind, KvEventLog, KvTier
from mullama.kv.index.tree import pack
from mullama.types import ChatAsk, Finish, FinishReason, ModelInfo, Profile, Request, SamplingParams

BOS = 1
N_VOCAB = 1000
HALF = 999  # the first byte of a character
N_CTX = 4096


def model_info(name: str = "fake") -> ModelInfo:
    return ModelInfo(
        name=name,
        path="fake.gguf",
        description="fake 1M",
        architecture="fake",
        n_params=1_000_000,
        size_bytes=2_000_000,
        n_vocab=N_VOCAB,
        n_ctx_train=N_CTX,
        n_ctx=N_CTX,
        n_parallel=4,
        n_layer=2,
        n_embd=8,
        n_swa=0,
        has_chat_template=True,
        is_recurrent=False,
        is_hybrid=False,
        created=1_700_000_000,
    )


class FakeParser:
    """Reads ``<think>…</think>``, content, and ``<tool_call>{"name": …, "arguments": …}</tool_call>``, a call when
    it is complete."""

    size = 0
    _ENDS = {"content": ("<think>", "<tool_call>"), "reasoning": ("</think>",), "call": ("</tool_call>",)}

    def __init__(self) -> None:
        self._state, self._text, self._n_calls = "content", "", 0

    def feed(self, text: str) -> list[AnswerPart]:
        self._text += text
        parts: list[AnswerPart] = []
        while True:
            ends = self._ENDS[self._state]
            if found := re.search("|".join(ends), self._text):
                self._tell(self._text[: found.start()], parts)
                self._text = self._text[found.end() :]
                self._state = {"<think>": "reasoning", "<tool_call>": "call"}.get(found[0], "content")
                continue
            if self._state != "call":
                held = max(n for end in ends for n in range(len(end)) if self._text.endswith(end[:n]))
                self._tell(self._text[: len(self._text) - held], parts)
                self._text = self._text[len(self._text) - held :]
            return parts

    def finish(self) -> list[AnswerPart]:
        parts: list[AnswerPart] = []
        if self._text:
            parts.append(("content", 0, self._text, ""))
        return parts

    def _tell(self, text: str, parts: list[AnswerPart]) -> None:
        if self._state != "call":
            if text:
                parts.append((self._state, 0, text, ""))
            return
        call, index = json.loads(text), self._n_calls
        arguments = json.dumps(call["arguments"])
        parts.append(("call", index, call["name"], call.get("id", "")))
        parts += [("arguments", index, arguments[:3], ""), ("arguments", index, arguments[3:], "")]
        self._n_calls += 1


class FakeGeneration(AsyncGeneration):
    """The real one, fed with the engine's reply on the event loop it was submitted on."""

    def __init__(self, engine: FakeEngine, request: Request) -> None:
        super().__init__(request.id, 0, lambda handle: None, asyncio.get_running_loop())
        self.request = request
        self.shifted = engine.shifts.pop(0) if request.context_shift and engine.shifts else 0
        self.cancelled_at: float | None = None
        self._engine = engine
        self._pieces = list(engine.reply)
        self._limit = request.sampling.max_tokens
        self._n_sent = 0
        self._timer: asyncio.TimerHandle | None = None
        if not engine.hang:
            self._timer = self._loop.call_later(engine.first_delay, self._step)

    def _step(self) -> None:
        engine = self._engine
        if engine.fail_after is not None and self._n_sent == engine.fail_after:
            self._end(FinishReason.ERROR, engine.failure)
        elif not self._pieces:
            self._end(FinishReason.STOP)
        elif self._limit is not None and self._n_sent >= self._limit:
            self._end(FinishReason.LENGTH)
        else:
            self._n_sent += 1
            self.deliver(self._pieces.pop(0), 1)
            self._timer = self._loop.call_later(engine.delay, self._step)

    def _end(self, reason: FinishReason, error: Exception | None = None) -> None:
        if self.finish is not None:
            return
        n_prompt = len(self.request.prompt)
        hit = min(self._engine.cached, n_prompt)
        profile = Profile(
            prompt_tokens=n_prompt,
            completion_tokens=self._n_sent,
            kv_cache_hit=hit,
            kv_cache_miss=n_prompt - hit,
            total_ms=self._engine.total_ms or (time.monotonic_ns() - self.request.arrival_ns) / 1e6,
            time_to_first_token_ms=1.25,
            steps=self._n_sent,
            mean_batch_size=2.0,
            context_shifted=self.shifted,
        )
        self._engine.running.discard(self)
        self.end(Finish(reason, profile, error=error))

    def cancel(self) -> None:
        if self.finish is None and self.cancelled_at is None:
            self.cancelled_at = time.monotonic()
            if self._timer is not None:
                self._timer.cancel()
            self._loop.call_later(0.002, self._end, FinishReason.CANCELLED)  # the step that is under way


class FakeKv:
    """``engine.kv``; ``kv_calls`` of the engine says what was asked of it."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self.events = KvEventLog()

    async def asnapshot(self) -> dict[str, Any]:
        return {"layout": "streams", "cells_used": 7, "retained": [], "policy": {"policy": "lru", "params": {}}}

    async def atree(self, *, limit: int = 1000, text: bool = False) -> dict[str, Any]:
        return {"nodes": [], "n_nodes": 0, "truncated": False, "limit": limit, "text": text}

    async def amap(self) -> dict[str, Any]:
        return {"caches": [{"name": "full", "streams": [{"stream": 0, "cells": 8, "runs": [[0, 5, 0], [5, 3, -1]]}]}]}

    async def apin(self, tokens: Sequence[int], *, ttl_s: float, namespace: str = "") -> dict[str, Any]:
        self._engine.kv_calls.append(("pin", list(tokens), {"ttl_s": ttl_s, "namespace": namespace}))
        return {"pinned_tokens": len(tokens)}

    async def aunpin(self, tokens: Sequence[int], *, namespace: str = "") -> dict[str, Any]:
        self._engine.kv_calls.append(("unpin", list(tokens), {"namespace": namespace}))
        return {"unpinned_tokens": len(tokens)}

    async def adrop(
        self, tokens: Sequence[int] | None = None, *, namespace: str = "", tiers: Sequence[str] = ()
    ) -> dict[str, Any]:
        named = None if tokens is None else list(tokens)
        self._engine.kv_calls.append(("drop", named, {"namespace": namespace, "tiers": list(tiers)}))
        return {"cells_freed": 7, "host_bytes_freed": 0, "disk_bytes_freed": 0}

    async def asave(self, tokens: Sequence[int], *, namespace: str = "") -> dict[str, Any]:
        self._engine.kv_calls.append(("save", list(tokens), {"namespace": namespace}))
        return {"tokens": len(tokens), "bytes": 10 * len(tokens)}

    async def aload(self, tokens: Sequence[int], *, namespace: str = "") -> dict[str, Any]:
        self._engine.kv_calls.append(("load", list(tokens), {"namespace": namespace}))
        raise InvalidRequest("this engine has no disk tier")

    async def aset_policy(self, spec: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        self._engine.kv_calls.append(("policy", None, {"spec": spec, "params": dict(params or {})}))
        if spec != "lfu":
            raise InvalidRequest(f"there is no eviction policy '{spec}'; there are lru, lfu", param="policy")
        return {"policy": spec, "params": dict(params or {})}


class FakePlanning:
    """``engine.planning``; ``scheduler_calls`` of the engine says what was asked of it."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    def snapshot(self) -> dict[str, Any]:
        return {"policy": "fcfs", "waiting": [], "running": [generation.id for generation in self._engine.running]}

    async def aset_policy(self, spec: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        self._engine.scheduler_calls.append(("set", spec, dict(params or {})))
        if spec != "fair":
            raise InvalidRequest(f"there is no scheduler '{spec}'; there are fcfs, fair", param="policy")
        return {"policy": spec, "params": dict(params or {}), "handed_over": len(self._engine.running)}

    async def aconfigure(self, params: Mapping[str, Any]) -> dict[str, Any]:
        self._engine.scheduler_calls.append(("configure", "", dict(params)))
        return {"policy": "fcfs", "params": dict(params), "handed_over": len(self._engine.running)}

    async def aset_shadow(self, spec: str | None, params: Mapping[str, Any] | None = None) -> None:
        self._engine.scheduler_calls.append(("shadow", spec or "", dict(params or {})))


class FakeWeights:
    """``engine.weights``: the adapters are in ``loras`` of the engine."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    def loras(self) -> list[dict[str, Any]]:
        return [{"id": name, **more} for name, more in self._engine.loras.items()]

    def load_lora(self, path: str | Path, id: str | None = None, scale: float = 1.0) -> dict[str, Any]:  # noqa: A002
        if self._engine.lora_error is not None:
            raise self._engine.lora_error
        name = id or Path(path).stem
        self._engine.loras[name] = {"path": str(path), "scale": scale}
        return {"id": name, **self._engine.loras[name]}

    def unload_lora(self, id: str) -> None:  # noqa: A002
        if self._engine.lora_error is not None:
            raise self._engine.lora_error
        if id not in self._engine.loras:
            raise AdapterNotFound(f"no adapter '{id}' is loaded", param="id")
        del self._engine.loras[id]


class FakeEngine:
    """Set the attributes to say what it does; ``requests`` and ``generations`` say what was asked of it."""

    def __init__(self, name: str = "fake", *, reply: Sequence[str] = ("Hel", "lo", " wörld", "!")) -> None:
        self.death: str | None = None
        self.info = model_info(name)
        self.reply = list(reply)
        self.delay = 0.0
        self.first_delay = 0.0
        self.hang = False
        self.cached = 0
        self.total_ms: float | None = None  # None: as long as it took
        self.fail_after: int | None = None
        self.failure: Exception | None = None
        self.submit_errors: list[Exception | None] = []  # one a submit; None: it works
        self.shifts: list[int] = []  # tokens that requests drop to go on, one a submit that may; then none
        self.is_up = True
        self.draining = False
        self.requests: list[Request] = []
        self.prepared: list[tuple[str, SamplingParams]] = []  # by which thread
        self.generations: list[FakeGeneration] = []
        self.running: set[FakeGeneration] = set()
        self.rendered: list[dict[str, Any]] = []
        self.asks: list[ChatAsk] = []
        self.thinks = False
        self.scheduler_calls: list[tuple[str, str, dict[str, Any]]] = []
        self.kv_calls: list[tuple[str, list[int] | None, dict[str, Any]]] = []
        self.kv = FakeKv(self)
        self.planning = FakePlanning(self)
        self.weights = FakeWeights(self)
        self.memory_error: Exception | None = None
        self.loras: dict[str, dict[str, Any]] = {}
        self.lora_error: Exception | None = None
        self.arbiter_policy = "round_robin"
        self.share: dict[str, Any] = {"weight": 1.0, "priority": 0}

    def is_ready(self) -> bool:
        return self.is_up and not self.draining

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        return ([BOS] if add_special else []) + [ord(c) % N_VOCAB for c in text]

    def prompt_tokens(
        self,
        text: str,
        *,
        add_special: bool = True,
        parse_special: bool = True,
        most: int | None = None,
        between: Callable[[], None] | None = None,
    ) -> list[int]:
        tokens = self.tokenize(text, add_special=add_special, parse_special=parse_special)
        if most is not None and len(tokens) > most:
            raise ContextLengthExceeded(f"the prompt has at least {most + 1} tokens", param="prompt", n_tokens=most + 1)
        return tokens

    def detokenize(self, tokens: Sequence[int], *, special: bool = False, only_whole: bool = False) -> str:
        text = "".join("\ufffd" if token == HALF else chr(token) for token in tokens if special or token != BOS)
        return text.removesuffix("\ufffd") if only_whole else text

    def pieces(self, tokens: Sequence[int]) -> list[bytes]:
        """Half of a character for the tokens from 900 on."""
        return [b"\xc3" if token >= 900 else chr(token).encode() for token in tokens]

    def vocabulary(self) -> dict[str, Any]:
        return {
            "bos_token": chr(BOS),
            "eos_token": None,
            "unk_token": None,
            "pad_token": None,
            "chat_template": "{{x}}",
        }

    def render_chat(
        self, messages_json: bytes, *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> str:
        self.rendered = json.loads(messages_json)
        if any(message.get("content") == "REFUSE" for message in self.rendered):
            raise InvalidRequest("the chat template refuses these messages", param="messages")
        text = "".join(f"<{m['role']}>{m.get('content') or ''}" for m in self.rendered)
        return text + ("<assistant>" if add_generation_prompt and not continue_final_message else "")

    def open_chat(self, messages_json: bytes, ask: ChatAsk, *, add_generation_prompt: bool = True) -> OpenedChat:
        """Answers are read in a form where functions are asked for, or ``thinks`` is set."""
        self.asks.append(ask)
        prompt = self.render_chat(messages_json, add_generation_prompt=add_generation_prompt)
        form = AnswerForm(FakeParser, stops=("<stop>",), shown=("<tool_call>",))
        return OpenedChat(prompt, form if ask.tools or self.thinks else None)

    def prepare(self, sampling: SamplingParams) -> Any:
        self.prepared.append((threading.current_thread().name, sampling))
        return len(self.prepared)

    def submit(self, request: Request) -> FakeGeneration:
        error = self.submit_errors.pop(0) if self.submit_errors else None
        if error is not None:
            raise error
        if self.draining:
            raise ShuttingDown("the server is shutting down")
        if not request.prompt:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if len(request.prompt) >= self.info.n_ctx:
            raise ContextLengthExceeded(f"the prompt has {len(request.prompt)} tokens, the context {self.info.n_ctx}")
        for use in request.lora:
            if use.id not in self.loras:
                raise InvalidRequest(f"lora: no adapter '{use.id}' is loaded", param="lora")
        if request.context_shift and not self.info.can_shift:
            raise InvalidRequest("it cannot shift its context", param="context_policy")
        generation = FakeGeneration(self, request)
        self.requests.append(request)
        self.generations.append(generation)
        self.running.add(generation)
        return generation

    def submit_sync(self, request: Request) -> Any:
        raise NotImplementedError("the web layer never submits from a thread")

    async def memory_report(self) -> dict[str, Any]:
        if self.memory_error is not None:
            raise self.memory_error
        return {
            "resident_bytes": 3000,
            "device_bytes": 0,
            "weights": {"allocated_bytes": 2000, "resident_bytes": 1500, "mapped_bytes": 1000, "copied_bytes": 500},
            "kv": {"allocated_bytes": 4000, "resident_bytes": 1500, "used_bytes": 70},
            "requests": [{"id": generation.id, "kv_bytes": 70} for generation in self.running],
        }

    def store(self, tokens: Sequence[int], *, request: str | None = None, namespace: bytes = b"") -> None:
        """Let a KV event happen, as the engine thread would."""
        seq, kind, tier = self.kv.events.next_seq(), KvEventKind.STORED, KvTier.DEVICE
        packed, now = pack(tokens), time.monotonic_ns()
        self.kv.events.append(KvEvent(seq, now, kind, tier, 0, len(tokens), namespace, packed, request, slot=0))

    async def drain(self, timeout: float) -> bool:
        self.draining = True
        end = time.monotonic() + timeout
        while self.running and time.monotonic() < end:
            await asyncio.sleep(0.01)
        cut = list(self.running)
        for generation in cut:
            generation.cancel()
        return not cut

    def close(self) -> None:
        self.is_up = False
