"""The nouns shared by every room. Plain data, no compiled code, no I/O.

Times are nanoseconds of the monotonic clock unless a name ends in ``_ms``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

#: Types that the cells of a KV cache may have, by ggml's names, and bytes of a block of 32 values.
CELL_TYPES = {
    "f32": 128, "f16": 64, "bf16": 64, "q8_0": 34, "q5_1": 24, "q5_0": 22, "q4_1": 20, "q4_0": 18, "iq4_nl": 18,
}  # fmt: skip


class FinishReason(enum.StrEnum):
    """Why a request ended. The first two are OpenAI's words."""

    STOP = "stop"  # end-of-generation token or a stop string
    LENGTH = "length"  # max_tokens or the end of the context
    CANCELLED = "cancelled"
    ERROR = "error"


class KvMode(enum.StrEnum):
    """What becomes of the KV when the weights change."""

    AUTO = "auto"  # carry where that is sound, else recompute
    CARRY = "carry"
    RECOMPUTE = "recompute"
    DRAIN = "drain"  # what runs ends with the old weights, in an engine beside the new one


class GapMode(enum.StrEnum):
    """Whether the old weights may be freed before the new ones are there."""

    AUTO = "auto"  # where memory does not hold both
    NEVER = "never"


class SleepLevel(enum.StrEnum):
    """Where the cached KV of a sleeping model waits."""

    HOST = "host"
    DISK = "disk"  # nothing of it stays in memory


@dataclass(slots=True, frozen=True)
class MemoryLeft:
    """Bytes that a budget leaves new weights: ``beside`` the old ones, and ``alone``, in their place."""

    beside: int
    alone: int


class ModelKind(enum.StrEnum):
    """What a model does; an engine does one of these."""

    GENERATE = "generate"
    EMBED = "embed"  # vectors of texts
    RANK = "rank"  # numbers of pairs of texts, by a head of its own


class Pooling(enum.StrEnum):
    """How the vectors of a text's tokens become the answer of an embedding model."""

    MEAN = "mean"
    CLS = "cls"  # the first token's
    LAST = "last"
    NONE = "none"  # all of them
    RANK = "rank"  # numbers of the model's own head


class SeqState(enum.StrEnum):
    """Where a sequence is in its life; the legal moves are in engine/requests/lifecycle.py."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    PREEMPTED = "preempted"  # its KV is in host memory, or dropped
    DONE = "done"


class Preempt(enum.StrEnum):
    """What becomes of a preempted sequence's KV."""

    AUTO = "auto"  # whichever costs less, by this engine's own measurements
    SWAP = "swap"  # saved to host memory, restored bit by bit
    RECOMPUTE = "recompute"  # given up, computed again


class ConstraintKind(enum.StrEnum):
    """What ``Constraint.text`` is."""

    JSON_OBJECT = "json_object"  # "": any JSON object
    JSON_SCHEMA = "json_schema"  # a JSON schema, as JSON
    REGEX = "regex"  # of the whole text, in the syntax of Rust's regex: without look-around and references
    CHOICE = "choice"  # a JSON list of the texts that may be
    LARK = "lark"  # a grammar in llguidance's dialect of Lark
    GBNF = "gbnf"  # a grammar in llama.cpp's notation


@dataclass(slots=True, frozen=True)
class Constraint:
    """What the text that is generated has to be. Nothing else can be sampled; where it is complete the request ends.

    It holds from the first token on, or:
    ``after``: from behind the first of these texts (the end of a model's thinking); before, all but the end may come.
    ``triggers``: from the first of these texts on, which it is about (the beginning of a tool call); before, all may
    come, and so may the end.
    """

    kind: ConstraintKind
    text: str = ""
    after: tuple[str, ...] = ()
    triggers: tuple[str, ...] = ()


@dataclass(slots=True, frozen=True)
class SamplingParams:
    """How tokens are chosen. Defaults are llama.cpp's own (``common_params_sampling``).

    A value that switches a sampler off: ``temperature`` 0 (greedy), ``top_k`` 0, ``top_p`` 1, ``min_p`` 0,
    ``typical_p`` 1, ``repeat_penalty`` 1, ``presence_penalty``/``frequency_penalty`` 0, ``dry_multiplier`` 0,
    ``xtc_probability`` 0, ``mirostat`` 0. Ranges are checked by the web layer and again by ``_core``.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64  # tokens looked back; -1: the whole context
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat: int = 0  # 0 off, 1 or 2
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    seed: int | None = None  # None: a fresh random seed
    max_tokens: int | None = None  # None: until the context ends
    min_tokens: int = 0  # end-of-generation and stop strings do not count before
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()  # control tokens that are part of the text, by their names; others are left out
    constraint: Constraint | None = None


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of the Python API's generating methods: SamplingParams, whose defaults hold, and Request.

    ``stop``, ``shown`` and ``dry_sequence_breakers`` take a text or several, ``logit_bias`` a dict from token id to
    what is added to its logit. ``lora``: ids of loaded LoRA adapters, or ids with scales, as ``{"poems": 0.5}``.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_penalty: float
    repeat_last_n: int
    presence_penalty: float
    frequency_penalty: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: str | SequenceOf[str]
    xtc_probability: float
    xtc_threshold: float
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    logit_bias: Mapping[int, float] | SequenceOf[tuple[int, float]]
    seed: int | None
    max_tokens: int | None
    min_tokens: int
    ignore_eos: bool
    stop: str | SequenceOf[str]
    shown: str | SequenceOf[str]
    constraint: Constraint | None
    priority: int
    user: str | None
    slo_ms: float | None
    preempt: Preempt | str
    cache_salt: str
    context_shift: bool
    lora: str | SequenceOf[str] | Mapping[str, float | None] | None


class ToolChoice(enum.StrEnum):
    """Whether an answer calls functions. The words are OpenAI's."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


@dataclass(slots=True, frozen=True)
class ChatAsk:
    """What a chat template is asked for beside the messages. JSON as bytes; empty: nothing.

    ``parameters``: for each function in ``tools`` what its calls are read with: a JSON schema of types, properties,
    required ones and items, and nothing that could take long (no references).
    """

    tools: bytes = b""  # OpenAI's list of functions, as the template shows them
    parameters: bytes = b""
    arguments: bytes = b""  # further arguments of the template, an object
    choice: ToolChoice = ToolChoice.AUTO
    parallel: bool = True  # several calls in one answer
    thinks: bool = True  # where the template leaves open whether the model thinks before it answers
    splits: bool = True  # thoughts are told apart from the content


@dataclass(slots=True, frozen=True)
class LoraUse:
    """A LoRA adapter that a request is computed with. ``scale`` None: the one that it was loaded with."""

    id: str
    scale: float | None = None


@dataclass(slots=True)
class Request:
    """One sequence to generate. ``prompt`` holds token ids of the model's vocabulary."""

    id: str
    prompt: SequenceOf[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    arrival_ns: int = 0  # when the request arrived (0: when it was submitted)
    priority: int = 0  # lower is more urgent, as vLLM spells it; ignored by policies without it
    user: str | None = None  # the tenant, for policies that share between tenants
    slo_ms: float | None = None  # wanted time to the first token, for policies with deadlines
    preempt: Preempt = Preempt.AUTO  # how it may be preempted
    cache_salt: str = ""  # requests with different ones never share KV
    tenant: str | None = None  # whose key sent it, where keys tell clients apart
    prepared: Any = None  # what ``EngineClient.prepare`` made of ``sampling``; None: ``submit`` does it
    shares_cache: bool = False  # other tenants' KV is beside its own: its profile quotes none of it and names nobody
    context_shift: bool = False  # when the context is full, drop older tokens and go on
    lora: tuple[LoraUse, ...] = ()  # adapters that compute it; none: the bare model
    # The prompt in the words of another model, when one takes over: what a chat's template makes of the messages.
    # Given the model; None: the prompt's text is tokenised again.
    translate: Callable[[Any], SequenceOf[int]] | None = None


@dataclass(slots=True)
class EmbeddingRequest:
    """Texts to make vectors of, as token ids of the model's vocabulary."""

    id: str
    prompts: SequenceOf[SequenceOf[int]]
    pooling: Pooling | None = None  # None: the model's own
    normalise: bool = True  # to length 1
    tenant: str | None = None  # whose key sent it
    client: str = ""  # clients are given their turns by this
    arrival_ns: int = 0  # when it arrived (0: when it was submitted)


@dataclass(slots=True, frozen=True)
class WeightSpan:
    """Completion tokens from ``from_token`` on (to the next span's) came from these weights."""

    weights: str
    from_token: int


@dataclass(slots=True)
class Profile:
    """What one request cost. Made of the sequence's row of the instrumentation page, never measured again.

    Token counts are of this request alone; times start when the request arrived.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    kv_cache_hit: int = 0  # prompt tokens whose KV was reused
    kv_cache_miss: int = 0  # prompt tokens computed
    kv_cache_evict: int = 0  # cached tokens of others evicted to make room
    queue_ms: float = 0.0  # arrival to the first step that worked on it
    prefill_ms: float = 0.0  # wall time of the decodes that held its prompt chunks
    decode_ms: float = 0.0  # wall time of the decodes that held its single tokens
    sample_ms: float = 0.0
    time_to_first_token_ms: float | None = None
    total_ms: float = 0.0
    steps: int = 0  # ubatches it took part in
    mean_batch_size: float = 0.0  # sequences a ubatch, over those ubatches
    threads_min: int = 0
    threads_max: int = 0
    preemptions: int = 0  # times it lost its slot to another sequence
    preempted_ms: float = 0.0  # wall time without a slot because of them
    recomputed_tokens: int = 0  # tokens computed again after them
    kv_cache_source: str = "none"  # where the reused tokens came from: in_place, copy, host, disk
    kv_miss_reason: str | None = None  # why the others had to be computed
    context_shifted: int = 0  # tokens dropped to go on when the context was full
    kv_bytes: int = 0  # its KV when it ended
    kv_byte_seconds: float = 0.0  # its KV over the time that it was held
    weights: tuple[WeightSpan, ...] = ()  # which weights generated which tokens
    adapters: tuple[LoraUse, ...] = ()  # LoRA adapters that computed all of it, with their scales
    kernels: dict[str, str] = field(default_factory=dict)  # in which way weights were multiplied, by their type

    def to_dict(self) -> dict[str, Any]:
        """PERF: ``asdict`` of the whole, which copies every number, takes as long as parsing a request."""
        found: dict[str, Any] = {}
        for name in _PROFILE_FIELDS:
            value = getattr(self, name)
            found[name] = round(value, 3) if isinstance(value, float) else value
        found["weights"] = tuple({"weights": one.weights, "from_token": one.from_token} for one in self.weights)
        found["adapters"] = tuple({"id": one.id, "scale": one.scale} for one in self.adapters)
        found["kernels"] = dict(self.kernels)
        return found


_PROFILE_FIELDS = tuple(one.name for one in fields(Profile))


@dataclass(slots=True)
class Finish:
    """How a request ended. ``error`` is set when ``reason`` is ERROR."""

    reason: FinishReason
    profile: Profile
    stop_string: str | None = None
    error: Exception | None = None


@dataclass(slots=True, frozen=True)
class Delta:
    """Text that became final (whole UTF-8 characters, no part of a stop string) and the tokens behind it.

    ``text`` may be empty: a token whose text is held back still counts.
    """

    text: str
    n_tokens: int


@dataclass(slots=True, frozen=True)
class ModelInfo:
    """What is known of a loaded model."""

    name: str  # the name clients use
    path: str
    description: str  # llama.cpp's, such as "llama 135M Q4_1"
    architecture: str
    n_params: int
    size_bytes: int
    n_vocab: int
    n_ctx_train: int
    n_ctx: int  # tokens (prompt and completion) one request may use
    n_parallel: int  # requests that run at once
    n_layer: int
    n_embd: int
    n_swa: int  # sliding-window size, 0 without one
    has_chat_template: bool
    is_recurrent: bool
    is_hybrid: bool
    created: int  # Unix time at which it was loaded
    can_shift: bool = False  # requests may go on beyond the context by dropping older tokens
    weights: str = ""  # which weights are in charge, by the name that a swap gave them
    mapped_bytes: int = 0  # of the weights, pages of their file, which the system may take back
    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)  # ways of computing, by type of weights
    kind: ModelKind = ModelKind.GENERATE
    pooling: Pooling | None = None  # of a model that embeds: where a request names none
    n_out: int = 0  # numbers of what it makes of a text
    cuts_vectors: bool = False  # its vectors may be cut short: ``dimensions`` of a request
