"""What the rooms above (web, cli) may ask of an engine. A real engine and the tests' fake one both have this shape.

No compiled code is imported here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mullama.kv.events import KvEventLog
from mullama.types import ChatAsk, Delta, EmbeddingRequest, Finish, ModelInfo, Request, SamplingParams


class Generation(Protocol):
    """One submitted request. ``finish`` is set once it ended, whatever the reason."""

    @property
    def id(self) -> str: ...

    @property
    def finish(self) -> Finish | None: ...

    def cancel(self) -> None:
        """Stop it from any thread; its KV is free within one step. Harmless when it has ended."""


class AsyncGeneration(Generation, Protocol):
    """Yields Deltas and stops after the last one; then ``finish`` is set.

    Deltas that piled up while nobody read are handed over merged. An error does not raise: it is in ``finish``.
    A cancelled wait loses nothing: the next one goes on. One reader at a time.
    """

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    async def __anext__(self) -> Delta: ...


class SyncGeneration(Generation, Protocol):
    """The same for threads. One that nobody refers to any more is cancelled."""

    def __iter__(self) -> Iterator[Delta]: ...

    def __next__(self) -> Delta: ...


#: Something new in an answer: its kind, the index of the call, the text, and the id that the model gave a call. Kinds:
#: ``reasoning``, ``content``, ``call`` (the text is the function's name), ``arguments`` (of the latest call).
AnswerPart = tuple[str, int, str, str]


class AnswerParser(Protocol):
    """Reads one answer while it is written. What it has told is never taken back, and does not depend on the pieces."""

    def feed(self, text: str) -> Sequence[AnswerPart]:
        """What is new with the next piece. What cannot be read is content."""

    def finish(self) -> Sequence[AnswerPart]:
        """What had been held back; the answer has ended."""

    @property
    def size(self) -> int:
        """Bytes that the next call may have to read again."""


@dataclass(slots=True, frozen=True)
class AnswerForm:
    """How the answers to a chat are written, and what has to be asked of the engine for it."""

    new_parser: Callable[[], AnswerParser]
    stops: tuple[str, ...] = ()  # texts that end the answer, and are no part of it
    shown: tuple[str, ...] = ()  # control tokens that the parser has to see (SamplingParams.shown)
    thinking_ends: tuple[str, ...] = ()  # what ends the thoughts


@dataclass(slots=True, frozen=True)
class OpenedChat:
    """``prompt``: see ``EngineClient.render_chat``. ``form`` None: the whole text of an answer is its content."""

    prompt: str
    form: AnswerForm | None


class Speaker(Protocol):
    """Puts the text of one request into another model's tokens (see ``Request.translate``)."""

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]: ...

    def bytes_alone(self, data: bytes) -> list[int]: ...

    def render_chat(
        self, messages_json: bytes, *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> str: ...

    def open_chat(self, messages_json: bytes, ask: ChatAsk, *, add_generation_prompt: bool = True) -> OpenedChat: ...


class KvClient(Protocol):
    """The KV cache of an engine. What is awaited is done at a step boundary."""

    @property
    def events(self) -> KvEventLog:
        """What happened to cached KV (GET /internal/kv/events)."""

    async def asnapshot(self) -> dict[str, Any]:
        """GET /internal/kv: layout, cells used and free, by whom; retained prefixes."""

    async def atree(self, *, limit: int = 1000, text: bool = False) -> dict[str, Any]:
        """GET /internal/kv/tree: the prefix tree, parents before children, at most ``limit`` nodes of it.

        ``text``: each node also has ``text``, what it holds in words, the middle of a long one left out.

        ``nodes``: each ``id``, ``parent`` (None below a root), ``start``, ``end``, ``tokens``, ``slots``, ``owners``
        (request ids), ``tiers``, ``host_bytes``, ``checkpoint_bytes``, ``hits``, ``last_used_ms_ago``,
        ``created_ms_ago``, ``cost_ms``, ``pinned_s`` (left), ``namespace`` (``short_namespace``). ``n_nodes`` counts
        all, and ``truncated`` says whether some are left out.
        """

    async def amap(self) -> dict[str, Any]:
        """GET /internal/kv/map: which cells belong to which sequence, as runs of equal cells.

        ``caches``: each ``name`` ("full", "window") and ``streams``, each ``stream``, ``cells`` (how many) and
        ``runs``, lists of first cell, number of cells, sequence or -1.
        """

    async def apin(self, tokens: Sequence[int], *, ttl_s: float, namespace: str = "") -> dict[str, Any]:
        """POST /internal/kv/pin: what is cached of this prefix stays for ``ttl_s`` seconds; ``pinned_tokens``."""

    async def aunpin(self, tokens: Sequence[int], *, namespace: str = "") -> dict[str, Any]:
        """POST /internal/kv/unpin: it may be evicted again; ``unpinned_tokens``. Harmless when it was not pinned."""

    async def adrop(
        self, tokens: Sequence[int] | None = None, *, namespace: str = "", tiers: Sequence[str] = ()
    ) -> dict[str, Any]:
        """POST /internal/kv/drop: give up cached KV of prompts that start with ``tokens``; what runs keeps its own.

        None: everything, of one namespace where one is given, else of all. ``tiers`` are names of ``KvTier``; none
        given: all. Returns ``cells_freed``, ``host_bytes_freed``, ``disk_bytes_freed``.
        """

    async def asave(self, tokens: Sequence[int], *, namespace: str = "") -> dict[str, Any]:
        """POST /internal/kv/save: write what is cached of this prefix to disk; ``tokens``, ``bytes``.

        Raises InvalidRequest where there is no disk tier.
        """

    async def aload(self, tokens: Sequence[int], *, namespace: str = "") -> dict[str, Any]:
        """POST /internal/kv/load: read what is on disk of this prefix into host memory; ``tokens``, ``bytes``.

        Raises InvalidRequest where there is no disk tier.
        """

    async def aset_policy(self, spec: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """PUT /internal/kv/policy: another eviction policy from now on; ``policy``, ``params``.

        ``asnapshot()["policy"]`` has the same form. Raises InvalidRequest (unknown policy or parameter); the one in
        charge stays.
        """


class PlanningClient(Protocol):
    """The scheduling policy of an engine, the shadow beside it, and what the engine has of the cores."""

    def snapshot(self) -> dict[str, Any]:
        """GET /internal/scheduler: policy, params, waiting and running sequences, step counters."""

    async def aset_policy(self, spec: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """PUT /internal/scheduler: another policy from the next step on; policy, params, sequences handed over.

        Raises InvalidRequest (unknown policy or parameter); the running policy stays.
        """

    async def aconfigure(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """PATCH /internal/scheduler: change parameters of the policy in charge. Raises InvalidRequest."""

    async def aset_shadow(self, spec: str | None, params: Mapping[str, Any] | None = None) -> None:
        """PUT and DELETE /internal/scheduler/shadow: a policy that is asked as well and decides nothing; None: none.

        Raises InvalidRequest (unknown policy or parameter); the shadow before stays.
        """

    def share(self) -> tuple[str, dict[str, Any]]:
        """The arbiter's policy, and what this engine has of the cores: ``weight``, ``priority``, ``turns``,
        ``computed_ms``, ``waited_ms``, ``is_waiting``."""

    def set_share(self, *, weight: float = 1.0, priority: int = 0) -> None:
        """What this engine may expect beside others (policies ``weighted`` and ``priority``). Raises InvalidRequest."""

    def set_arbiter_policy(self, policy: str) -> None:
        """How the engines of this process take turns: round_robin, weighted, priority. Raises InvalidRequest."""


class WeightsClient(Protocol):
    """The LoRA adapters on an engine's weights."""

    def loras(self) -> list[dict[str, Any]]:
        """The LoRA adapters that requests may name: each ``id``, ``path``, ``scale`` (where a request names none),
        ``name``, ``rank``, ``alpha``, ``n_matrices``, ``sha256``, ``size_bytes``, ``requests`` (that use it now)."""

    def load_lora(self, path: str | Path, id: str | None = None, scale: float = 1.0) -> dict[str, Any]:  # noqa: A002
        """Check a LoRA adapter's file and load it beside the weights, while requests go on; returns its entry.

        ``id``: by which requests name it (default: from the file's name). Blocks; not on an event loop. Raises
        InvalidRequest (an id that is taken or none, a scale out of range), AdapterMismatch (of another model),
        BadModelFile (damaged), ModelBusy while the weights are being changed.
        """

    def unload_lora(self, id: str) -> None:  # noqa: A002
        """Free an adapter; cached KV that it computed stays. Blocks; not on an event loop.

        Raises AdapterNotFound, AdapterBusy while a request uses it, ModelBusy while the weights are being changed.
        """


class EngineClient(Protocol):
    """A loaded model that generates. Every method may be called from any thread unless it says otherwise."""

    @property
    def info(self) -> ModelInfo:
        """What is loaded."""

    @property
    def kv(self) -> KvClient: ...

    @property
    def planning(self) -> PlanningClient: ...

    @property
    def weights(self) -> WeightsClient: ...

    @property
    def death(self) -> str | None:
        """Why the engine thread stopped by itself: nothing is answered any more. None: it did not. Any thread."""

    def is_ready(self) -> bool:
        """Loaded, and the engine thread makes progress (or has nothing to do)."""

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text. The GIL is released while it works. Raises InvalidRequest for lone surrogates."""

    def prompt_tokens(
        self,
        text: str,
        *,
        add_special: bool = True,
        parse_special: bool = True,
        most: int | None = None,
        between: Callable[[], None] | None = None,
    ) -> list[int]:
        """What ``tokenize`` gives, worked out in pieces; ``between`` is called from one to the next.

        Raises ContextLengthExceeded as soon as there are surely more than ``most``, InvalidRequest.
        """

    def detokenize(self, tokens: Sequence[int], *, special: bool = False, only_whole: bool = False) -> str:
        """Text of token ids, malformed UTF-8 replaced by U+FFFD. ``special``: control tokens are spelled out.

        ``only_whole``: a character that has only begun where the tokens end is left out, as at the end of a stream.
        """

    def pieces(self, tokens: Sequence[int]) -> list[bytes]:
        """The bytes of each token, of control tokens their names. A piece may be a part of a character."""

    def vocabulary(self) -> dict[str, Any]:
        """``bos_token``, ``eos_token``, ``unk_token``, ``pad_token`` (their text, None where there is none) and
        ``chat_template``, the source of the template in use."""

    def render_chat(
        self, messages_json: bytes, *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> str:
        """The prompt of a chat, by the model's template (ChatML when it has none).

        ``messages_json`` is the JSON array of OpenAI messages. The GIL is released while it works.
        Tokenise the result itself with ``add_special=True`` (it knows which control tokens are only spelled by the
        messages, and stay text): a BOS that the vocabulary adds by itself is left out here.
        ``continue_final_message``: the last one is the assistant's, and the prompt ends with its text.
        Raises InvalidRequest when the template refuses the messages.
        """

    def open_chat(self, messages_json: bytes, ask: ChatAsk, *, add_generation_prompt: bool = True) -> OpenedChat:
        """The prompt of a chat with functions and thoughts, as ``render_chat`` makes it, and the form of its answers.

        A template that knows no functions shows them in its system message. Raises InvalidRequest as ``render_chat``.
        """

    def prepare(self, sampling: SamplingParams) -> Any:
        """What is dear about opening a request with these parameters (DRY's breakers, many biases), done ahead.

        Any thread; the GIL is released while it works. ``Request.prepared`` takes it, with any seed and ``max_tokens``.
        Raises InvalidRequest as ``submit`` does.
        """

    def submit(self, request: Request) -> AsyncGeneration:
        """Queue a request; call on the event loop that will read it.

        Raises QueueFull, ShuttingDown, EngineDead, ContextLengthExceeded (prompt leaves no room for one token),
        InvalidRequest (empty prompt, token ids outside the vocabulary). ``max_tokens`` is cut to what fits.
        """

    def submit_sync(self, request: Request) -> SyncGeneration:
        """The same for a caller without an event loop."""

    async def memory_report(self) -> dict[str, Any]:
        """This model's part of GET /internal/memory, in bytes: allocated, and resident in this process.

        ``resident_bytes`` (the sum) and ``device_bytes``; ``weights`` (``mapped_bytes``, ``copied_bytes``,
        ``buffers``), ``kv`` (also used, retained and shared, and by kind ``full``, ``window``, ``recurrent``),
        ``compute``, ``output``, ``tables_bytes``, ``adapters``, ``host_tier_bytes``, ``disk_tier_bytes``,
        ``parked_sequences``, ``parked_bytes``, ``staging_bytes``, ``is_changing_weights``; ``requests``: each ``id``,
        ``state``, ``kv_bytes``, ``kv_bytes_peak``, ``kv_byte_seconds``, ``parked_bytes``. Cells are counted at a step
        boundary, pages right after it.
        """

    def counters(self) -> dict[str, int]:
        """The engine's counters, one consistent copy of its instrumentation page (names: abi.h)."""

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109
        """Refuse new requests, wait for running ones up to ``timeout`` seconds, cancel the rest. True: none was cut."""

    def close(self) -> None:
        """Stop the engine thread and free the context and the model. Idempotent."""


class EmbeddingClient(EngineClient, Protocol):
    """A loaded model that embeds or ranks (``info.kind``). What is for models which generate raises InvalidRequest."""

    def affixes(self) -> tuple[list[int], list[int]]:
        """The tokens that the vocabulary puts before and behind every text."""

    def pair_tokens(self, query: str, document: str, most: int | None = None) -> list[int]:
        """Two texts as one prompt for a model that ranks; the second is cut where there are more than ``most``."""

    async def embed(self, request: EmbeddingRequest) -> list[bytes]:
        """What becomes of each text, in their order, as the bytes of 32-bit floats: ``info.n_out`` of them, for each
        token where the pooling is ``none``. Cancelling it gives the rest up.

        Raises QueueFull, ShuttingDown, EngineDead, ContextLengthExceeded (a text is longer than ``info.n_ctx``),
        InvalidRequest (no text, an empty one, token ids outside the vocabulary, a pooling that the model does not
        have), ComputeFailed.
        """
