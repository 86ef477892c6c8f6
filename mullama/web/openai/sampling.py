"""Numbers from JSON to SamplingParams: the one table of ranges, and the checks that need the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import msgspec

from mullama.config import ServeConfig
from mullama.errors import ConfigError, InvalidRequest
from mullama.types import ModelInfo, SamplingParams

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024  # characters; every token's text is held against every stop string
MAX_BREAKERS = 64
SEED_MODULUS = 0xFFFFFFFF  # llama.cpp seeds are 32 bits, and the largest one means "random"

_TOKEN_ID = re.compile(r"[0-9]{1,10}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Range:
    """A closed interval, open at ``low`` if ``above``; ``high`` None: no upper bound."""

    low: float
    high: float | None = None
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (value > self.low if self.above else value >= self.low) and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.high is None:
            return f"greater than {self.low}" if self.above else f"at least {self.low}"
        if self.above:
            return f"greater than {self.low} and at most {self.high}"
        return f"between {self.low} and {self.high}"

    def schema(self) -> dict[str, Any]:
        """As JSON Schema has it."""
        found: dict[str, Any] = {"exclusiveMinimum" if self.above else "minimum": self.low}
        return found | ({} if self.high is None else {"maximum": self.high})


#: The field of the request -> what it may be. docs/api.md lists the same (a test compares).
RANGES: dict[str, Range] = {
    "n": Range(1, 128),
    "max_tokens": Range(1),
    "max_completion_tokens": Range(1),
    "n_predict": Range(1),
    "min_tokens": Range(0),
    "temperature": Range(0, 2),
    "top_k": Range(-1),
    "top_p": Range(0, 1),
    "min_p": Range(0, 1),
    "typical_p": Range(0, 1),
    "repeat_penalty": Range(0, 100, above=True),
    "repetition_penalty": Range(0, 100, above=True),
    "repeat_last_n": Range(-1),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "dry_multiplier": Range(0, 100),
    "dry_base": Range(1, 100),
    "dry_allowed_length": Range(0),
    "dry_penalty_last_n": Range(-1),
    "xtc_probability": Range(0, 1),
    "xtc_threshold": Range(0, 1),
    "mirostat": Range(0, 2),
    "mirostat_tau": Range(0, 100),
    "mirostat_eta": Range(0, 1),
    "seed": Range(-(2**63), 2**63 - 1),
    "priority": Range(-(2**31), 2**31 - 1),
    "slo_ms": Range(1, 86_400_000),
    "truncate_prompt_tokens": Range(-1),
}

#: Several spellings of one sampling parameter; the first that is given counts.
_SPELLINGS = {
    "max_tokens": ("max_completion_tokens", "max_tokens", "n_predict"),
    "repeat_penalty": ("repeat_penalty", "repetition_penalty"),
}
_PARAMS = (
    *("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty"),
    *("repeat_last_n", "presence_penalty", "frequency_penalty", "dry_multiplier", "dry_base", "dry_allowed_length"),
    *("dry_penalty_last_n", "xtc_probability", "xtc_threshold", "mirostat", "mirostat_tau", "mirostat_eta"),
)
#: Those that the server has options for by the same names.
_CONFIGURED = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty")
_TYPES: dict[str, Any] = {
    one.name: int if one.default is None or isinstance(one.default, int) else float for one in fields(SamplingParams)
}
#: PERF: each parameter beside each of its spellings.
_FIELDS = tuple((param, field) for param in _PARAMS for field in _SPELLINGS.get(param, (param,)))
#: As ``max_tokens``: what leaving it out means (llama-server, LM Studio).
NO_LIMIT = -1
#: Counts of tokens to generate: the engine knows what room they have. It takes none above this.
_LIMITS = {"max_tokens", "min_tokens"}
MAX_TOKENS = 1 << 30
#: Counts of tokens looked at: beyond the context they mean the context, and C code gets no number it cannot hold.
_COUNTS = {"repeat_last_n", "dry_allowed_length", "dry_penalty_last_n"}


def range_schemas(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """JSON Schema of the ranges, beside what the types say."""
    unlimited = {"minimum": NO_LIMIT, "not": {"const": 0}}
    return {name: unlimited if name in _SPELLINGS["max_tokens"] else RANGES[name].schema() for name in names}


def check_range(name: str, value: float | None) -> None:
    """Raises InvalidRequest naming the field, its value and what it may be."""
    if value is not None and value not in RANGES[name]:
        unlimited = f", or {NO_LIMIT} for no limit" if name in _SPELLINGS["max_tokens"] else ""
        raise InvalidRequest(f"{name}: {value} is out of range; it must be {RANGES[name]}{unlimited}", param=name)


def sampler_values(body: object, info: ModelInfo, defaults: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The SamplingParams fields that the request gives, and the ``defaults`` for others, checked and cut to what the
    model can mean."""
    values: dict[str, Any] = {}
    for param, field in _FIELDS:
        value = getattr(body, field, None)
        if value is None:
            continue
        if param == "max_tokens" and value == NO_LIMIT:
            values.setdefault(param, None)
            continue
        check_range(field, value)
        if param not in values:
            most = MAX_TOKENS if param in _LIMITS else info.n_ctx if param in _COUNTS else value
            values[param] = min(value, most)
    values = {**defaults, **values}
    if "top_k" in values:
        values["top_k"] = min(max(values["top_k"], 0), info.n_vocab)  # -1 switches it off, as in vLLM
    if values.get("min_tokens", 0) > (values.get("max_tokens") or MAX_TOKENS):
        raise InvalidRequest("min_tokens: it must not be greater than max_tokens", param="min_tokens")
    return values


_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
_JSON_TEXT = r'"([^"\\\u0000-\u001f]|\\["\\/bfnrt])+"'  # one text of a list, as JSON
#: JSON Schema of what the functions below take.
STOP_SCHEMA = {
    "anyOf": [
        {"type": ["string", "null"], "maxLength": MAX_STOP_LENGTH},
        {"type": "array", "items": _TEXT, "maxItems": MAX_STOPS},
        {"type": "array", "items": {"const": ""}},
    ]
}
BREAKERS_SCHEMA = {
    "anyOf": [
        {"type": "null"},
        {"type": "array", "items": _TEXT, "maxItems": MAX_BREAKERS},
        {"type": "string", "pattern": rf"^\[({_JSON_TEXT}(, ?{_JSON_TEXT}){{0,{MAX_BREAKERS - 1}}})?\]$"},
    ]
}
TOKEN_ID_SCHEMA = {"type": "integer", "minimum": 0}
TOKEN_IDS_SCHEMA = {"type": "array", "items": TOKEN_ID_SCHEMA, "minItems": 1}
_BIAS = {"type": "number", "minimum": -100, "maximum": 100}
BIAS_SCHEMA = {
    "anyOf": [
        {"type": "null"},
        {"type": "object", "propertyNames": {"pattern": f"^{_TOKEN_ID.pattern}$"}, "additionalProperties": _BIAS},
        {
            "type": "array",
            "items": {
                "type": "array",
                "prefixItems": [TOKEN_ID_SCHEMA, _BIAS],
                "minItems": 2,
                "maxItems": 2,
            },
        },
    ]
}


class SamplingDefaults:
    """What sampling parameters are where a request says nothing: the server's, and over them those of its model."""

    def __init__(self, config: ServeConfig) -> None:
        """Raises ConfigError for a field that is none, and a value out of its range."""
        common: dict[str, Any] = {name: getattr(config, name) for name in _CONFIGURED}
        self._common = common | {"max_tokens": None if config.max_tokens < 1 else config.max_tokens}
        self._of_model: dict[str, dict[str, Any]] = {}
        for text in config.sampling:
            model, *pairs = text.split(" ")
            self._of_model[model.lower()] = self._common | dict(map(self._value, pairs))

    @staticmethod
    def _value(pair: str) -> tuple[str, Any]:
        name, _, text = pair.partition("=")
        if name not in _PARAMS or name == "min_tokens":
            raise ConfigError(f"--sampling: '{name}' is no sampling parameter", param="sampling")
        try:
            value = msgspec.json.decode(text, type=_TYPES[name])
            check_range(name, None if (name, value) == ("max_tokens", NO_LIMIT) else value)
        except (msgspec.MsgspecError, InvalidRequest) as error:
            raise ConfigError(f"--sampling: {pair}: {error}", param="sampling") from None
        return name, None if (name, value) == ("max_tokens", NO_LIMIT) else value

    def of(self, model: str) -> dict[str, Any]:
        """By the names of SamplingParams; ``model`` is a served name."""
        return self._of_model.get(model.lower(), self._common)


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Raises InvalidRequest for too many or too long ones, and empty ones beside others; empty alone means none."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if not any(stops):
        return ()
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop: {len(stops)} strings are too many; at most {MAX_STOPS} are taken", param="stop")
    for text in stops:
        if not text:
            raise InvalidRequest("stop: a stop string must not be empty", param="stop")
        if len(text) > MAX_STOP_LENGTH:
            raise InvalidRequest(f"stop: a stop string has at most {MAX_STOP_LENGTH} characters", param="stop")
    return stops


def breakers(given: str | Sequence[str]) -> tuple[str, ...]:
    """DRY sequence breakers: a list, or one as JSON text, as SillyTavern sends it. Raises InvalidRequest for another
    text, and for too many, too long or empty ones."""
    name = "dry_sequence_breakers"
    if isinstance(given, str):
        try:
            texts = msgspec.json.decode(given, type=list[str])
        except (msgspec.DecodeError, UnicodeEncodeError):
            raise InvalidRequest(f"{name}: expected a list of texts, or one as JSON text", param=name) from None
    else:
        texts = list(given)
    if len(texts) > MAX_BREAKERS or not all(0 < len(text) <= MAX_STOP_LENGTH for text in texts):
        raise InvalidRequest(
            f"{name}: it takes at most {MAX_BREAKERS} texts of 1 to {MAX_STOP_LENGTH} characters", param=name
        )
    return tuple(texts)


def logit_biases(biases: Mapping[str, float] | Sequence[Any] | None, info: ModelInfo) -> tuple[tuple[int, float], ...]:
    """OpenAI's ``{"token id": bias}``, or llama-server's ``[[token id, bias]]``. Raises InvalidRequest for other keys,
    ids outside the vocabulary, biases outside -100..100."""
    checked = []
    for key, bias in _bias_pairs(biases or {}):
        if not _TOKEN_ID.fullmatch(key):
            raise InvalidRequest(f"logit_bias: {key[:40]!r} is not a token id; it must be a number", param="logit_bias")
        token = int(key)
        if token >= info.n_vocab:
            raise InvalidRequest(f"logit_bias: {outside_vocabulary(token, info)}", param="logit_bias")
        if not -100 <= bias <= 100:
            raise InvalidRequest(
                f"logit_bias: the bias {bias} of token {token} is out of range; it must be between -100 and 100",
                param="logit_bias",
            )
        checked.append((token, float(bias)))
    return tuple(checked)


def _bias_pairs(biases: Mapping[str, float] | Sequence[Any]) -> list[tuple[str, float]]:
    if isinstance(biases, Mapping):
        return list(biases.items())
    try:
        pairs = msgspec.convert(biases, list[tuple[int, float]])
    except msgspec.ValidationError:
        words = "logit_bias: expected an object of token ids and biases, or a list of pairs of them"
        raise InvalidRequest(words, param="logit_bias") from None
    return [(str(token), bias) for token, bias in pairs]


def check_tokens(tokens: Sequence[int], name: str, info: ModelInfo) -> None:
    """Raises InvalidRequest for ids outside the vocabulary; ``name`` is the field. Linear, at C speed."""
    if tokens and not (min(tokens) >= 0 and max(tokens) < info.n_vocab):
        at, token = next((i, t) for i, t in enumerate(tokens) if not 0 <= t < info.n_vocab)
        raise InvalidRequest(f"{name}[{at}]: {outside_vocabulary(token, info)}", param=f"{name}[{at}]")


def outside_vocabulary(token: int, info: ModelInfo) -> str:
    return f"token id {token} is outside the vocabulary; it must be between 0 and {info.n_vocab - 1}"


def seed_of(seed: int | None) -> int | None:
    """A 32-bit seed that llama.cpp takes as it is; None and -1 ask for a random one."""
    check_range("seed", seed)
    return None if seed is None or seed == -1 else seed % SEED_MODULUS
