"""One configuration: flags, ``MULLAMA_*`` environment variables and a TOML file, described once, here.

``ServeConfig`` is the single list of server options. The CLI makes its flags from it, ``load_config`` reads the
environment and the file by the same names, and docs/configuration.md is generated from it (a test compares).
Precedence: flag, environment, file, default.
"""

# ruff: noqa: RUF009 - option() makes dataclass fields, so that each default is made anew

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import os
import re
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from mullama.errors import ConfigError
from mullama.files import parse_size
from mullama.logs import FORMATS
from mullama.types import CELL_TYPES

ENV_PREFIX = "MULLAMA_"
#: Variables with our prefix that are no option of a server: of the store, of other commands, of tests.
OTHER_VARIABLES = frozenset(
    (
        *("MULLAMA_HOME", "MULLAMA_CONFIG", "MULLAMA_URL", "MULLAMA_CHILD_OF", "MULLAMA_CRASH_AT", "MULLAMA_LONG"),
        *("MULLAMA_TRIAL", "MULLAMA_TRIAL_FAULT", "MULLAMA_ADOPT_KERNELS", "MULLAMA_TEST_MODEL", "MULLAMA_TEST_GEMMA"),
    )
)
DEFAULT_MODEL = "smollm2:135m"
_MANY = 1 << 30  # fits the C side's 32-bit integers
#: Ways of computing (mullama/machine/trials.py); a test compares them.
KERNELS = ("auto", "plain", "sgemm", "tiles", "tiled", "repack", "amx")

ARBITER_POLICIES = ("round_robin", "weighted", "priority")

_SPLIT = r"(\d+(\.\d+)?(,\d+(\.\d+)?)*)?"


#: Titles of the groups that --help shows, each by its first option, in the order of the options.
GROUPS = {
    "model": "Models",
    "host": "Address",
    "ctx_size": "Context and threads",
    "kv_tokens": "KV cache",
    "scheduler": "Scheduling",
    "deterministic": "Computing",
    "temperature": "Sampling",
    "gpu_layers": "GPUs",
    "api_key": "Keys and clients",
    "profile_log": "Logs, events and pages",
}


def option(default: Any, help: str, **metadata: Any) -> Any:  # noqa: A002 - the field's own word
    """A dataclass field with its documentation. ``metavar``, ``choices``, ``minimum``, ``maximum``, ``pattern`` (of
    the whole text; shown by the metavar), ``secret`` (a key: never shown, never empty, may be ``@FILE``), ``unit``
    ("bytes", as 8GB, or "tokens", as 4k)."""
    meta = {"help": help, **metadata}
    shown = not meta.get("secret", False)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta, repr=shown)
    return field(default=default, metadata=meta, repr=shown)


@dataclass(slots=True)
class ServeConfig:
    """Options of ``mullama serve``. A field ``ctx_size`` is ``--ctx-size``, ``MULLAMA_CTX_SIZE`` and ``ctx_size =``."""

    model: list[str] = option([], "model to serve, as REFERENCE or NAME=REFERENCE; repeatable", metavar="MODEL")
    lora: list[str] = option(
        [], "LoRA adapter for the models that it fits, as NAME=PATH of a GGUF file; repeatable", metavar="NAME=PATH"
    )
    alias: list[str] = option(
        [], "further name of a served model, as ALIAS=NAME; repeatable", metavar="ALIAS=NAME", pattern=r"[^=]+=[^=]+"
    )
    any_model: bool = option(False, "answer requests for a model that is not served with the first one")
    require_model: bool = option(False, "refuse requests that name no model; without it the first one answers")
    quant: str = option(
        "",
        "quantisation of models whose reference names no file, such as Q4_K_M; none: the reference's own",
        metavar="QUANT",
        pattern=r"([A-Za-z0-9][A-Za-z0-9_.-]{0,63})?",
    )
    allow_private_sources: bool = option(
        False, "fetch models also from private addresses and over plain HTTP, also in pulls over HTTP"
    )
    max_models: int = option(
        0, "models loaded at once; more may be served, idle ones make room; 0: no limit", minimum=0, maximum=1024
    )
    memory_budget: str = option(
        "auto",
        "memory that loaded models may take, in bytes; auto: most of what is free at the start; 0: no limit",
        metavar="auto|BYTES",
        pattern=r"auto|\d{1,15}",
        unit="bytes",
    )
    memory_check: str = option(
        "on",
        "refuse to load what would take more memory than is free, by the estimate of mullama fit",
        choices=("on", "off"),
    )
    keep_alive: str = option(
        "-1", "how long an idle model stays loaded: seconds, 5m, 1h30m; -1: for ever", metavar="DURATION"
    )
    sleep_after: str = option(
        "-1", "how long a model is idle before it sleeps: seconds, 5m, 1h30m; -1: never", metavar="DURATION"
    )
    sleep_level: str = option(
        "host",
        "where the cached KV of a sleeping model waits; disk needs --kv-disk-dir",
        choices=("host", "disk"),
    )
    model_policy: str = option("lru", "which idle model makes room: lru, largest, or a plugin", metavar="NAME")
    store_models: bool = option(True, "serve every model of the store, loaded when it is asked for")
    arbiter: str = option(
        "round_robin",
        "how models that compute at once share the cores, step by step",
        choices=ARBITER_POLICIES,
    )
    host: str = option(
        "127.0.0.1",
        "address to listen on, a name with all of its addresses, or a Unix socket",
        metavar="HOST|unix:PATH",
    )
    port: int = option(8080, "port to listen on; 0 picks a free one", minimum=0, maximum=65535)

    ctx_size: int = option(
        0,
        "tokens one request may use, prompt and completion; 0: automatic",
        minimum=0,
        maximum=_MANY,
        unit="tokens",
    )
    context_policy: str = option(
        "error",
        "what is done where the context is too small and the request does not say",
        choices=("error", "truncate_left", "truncate_middle", "shift"),
    )
    parallel: int = option(0, "requests that run at once; 0: automatic", minimum=0, maximum=256)
    threads: int = option(0, "most CPU threads for compute; 0: all cores this process may use", minimum=0, maximum=512)
    threads_fixed: bool = option(False, "keep that number of threads, switch the governor off")
    kernels: str = option(
        "auto",
        "how weights are multiplied: auto (what is right and fastest by trials on this machine), or one way for all",
        choices=KERNELS,
    )
    batch_size: int = option(512, "most tokens one decode call computes", minimum=32, maximum=16384, unit="tokens")
    kv_tokens: int = option(
        0,
        "tokens the KV cache holds over all requests; 0: parallel x ctx-size",
        minimum=0,
        maximum=_MANY,
        unit="tokens",
    )
    kv_layout: str = option(
        "streams",
        "streams: each request has cells of its own; unified: all share one buffer, a common prefix is stored once",
        choices=("streams", "unified"),
    )
    kv_type_k: str = option("f16", "type of cached keys", choices=tuple(CELL_TYPES))
    kv_type_v: str = option(
        "f16", "type of cached values; quantised ones need flash attention", choices=tuple(CELL_TYPES)
    )
    kv_host_bytes: int = option(
        -1,
        "host memory for cached prefixes; -1: a quarter of what is free, 0: none",
        minimum=-1,
        maximum=1 << 50,
        unit="bytes",
    )
    kv_disk_dir: str = option("", "folder where cached prefixes survive a restart; none: no disk tier", metavar="DIR")
    kv_disk_bytes: int = option(10 << 30, "most bytes in that folder", minimum=1 << 20, maximum=1 << 50, unit="bytes")
    kv_policy: str = option(
        "lru",
        "who leaves the KV cache first: lru, lfu, fifo, cost, turns, or a file's class",
        metavar="NAME|FILE:CLASS",
    )
    kv_policy_arg: list[str] = option([], "parameter of that policy; repeatable", metavar="NAME=VALUE")
    swap_bytes: int = option(
        0,
        "host memory for the KV of preempted requests; 0: a quarter of what is free",
        minimum=0,
        maximum=1 << 50,
        unit="bytes",
    )
    scheduler: str = option(
        "fcfs", "scheduling policy: a name (mullama schedulers), or a file's class", metavar="NAME|FILE:CLASS"
    )
    scheduler_arg: list[str] = option([], "parameter of the policy; repeatable", metavar="NAME=VALUE")
    shadow_scheduler: str = option(
        "", "policy that is asked as well and reported on, but decides nothing", metavar="NAME|FILE:CLASS"
    )
    plan_timeout_ms: float = option(
        100.0, "how long a user's policy may think before fcfs replaces it", minimum=1.0, maximum=60000.0
    )
    max_queue: int = option(256, "requests that may wait; one more is answered 503", minimum=0, maximum=_MANY)
    deterministic: bool = option(
        False,
        "the same answer whatever is computed beside it and whatever was cached (CPU; slower; layout streams)",
    )
    flash_attn: str = option("auto", "flash attention", choices=("auto", "on", "off"))
    mmap: bool = option(True, "map the model file instead of reading it")
    parse_special_content: bool = option(
        False, "parse control tokens that the messages of a chat spell out, which lets them forge turns"
    )
    chat_template: str = option(
        "",
        "chat template instead of the model's own: Jinja, @FILE, or one of llama.cpp's by name (llama3, chatml, …)",
        metavar="TEMPLATE",
    )

    temperature: float = option(
        0.8, "temperature of requests that name none; 0 is greedy", minimum=0.0, maximum=2.0, metavar="NUMBER"
    )
    top_k: int = option(40, "top_k of requests that name none; 0: off", minimum=-1, maximum=_MANY)
    top_p: float = option(0.95, "top_p of requests that name none", minimum=0.0, maximum=1.0, metavar="NUMBER")
    min_p: float = option(0.05, "min_p of requests that name none", minimum=0.0, maximum=1.0, metavar="NUMBER")
    repeat_penalty: float = option(
        1.0, "repeat_penalty of requests that name none; 1: off", minimum=0.01, maximum=100.0, metavar="NUMBER"
    )
    presence_penalty: float = option(
        0.0, "presence_penalty of requests that name none", minimum=-2.0, maximum=2.0, metavar="NUMBER"
    )
    frequency_penalty: float = option(
        0.0, "frequency_penalty of requests that name none", minimum=-2.0, maximum=2.0, metavar="NUMBER"
    )
    max_tokens: int = option(
        -1, "most tokens of an answer to requests that say none; -1: no limit", minimum=-1, maximum=_MANY, unit="tokens"
    )
    sampling: list[str] = option(
        [],
        "the same for one model, as 'NAME temperature=0.2 top_k=20'; a table of tables in a file; repeatable",
        metavar="'NAME FIELD=VALUE …'",
        pattern=r"\S+( \w+=\S+)+",
    )

    gpu_layers: str = option(
        "auto", "layers on the GPU: auto (what fits) or a number", metavar="auto|N", pattern=r"auto|\d{1,4}"
    )
    device: list[str] = option([], "device to use, by llama.cpp's name; repeatable", metavar="DEVICE")
    split_mode: str = option("layer", "how to split over GPUs", choices=("none", "layer", "row"))
    tensor_split: str = option("", "share of each GPU, such as 3,1", metavar="N,N,…", pattern=_SPLIT)

    api_key: list[str] = option(
        [],
        "key that clients must send as a bearer token; repeatable: each is a tenant; @FILE has one a line",
        metavar="KEY|@FILE",
        secret=True,
    )
    cache_shared_by_keys: bool = option(
        False, "let API keys share cached KV: hit counts and times then tell a tenant what others have sent"
    )
    admin_key: str = option(
        "",
        "key that shows and changes all under /internal; needed when not on loopback",
        metavar="KEY|@FILE",
        secret=True,
    )
    key_file: str = option(
        "",
        "TOML file of keys with names, roles and limits, beside the keys above; read again on SIGHUP",
        metavar="FILE",
    )
    allowed_host: list[str] = option(
        [], "extra Host header to accept, .example.org for a domain; repeatable; * accepts all", metavar="HOST"
    )
    cors_origin: list[str] = option(
        [], "web origin whose pages may ask, such as https://chat.example.org; repeatable; * for all", metavar="ORIGIN"
    )
    max_body_bytes: int = option(8 << 20, "largest request body", minimum=1024, maximum=_MANY, unit="bytes")
    response_store_bytes: int = option(
        64 << 20,
        "memory for the answers of /v1/responses that are kept; 0: none are",
        minimum=0,
        maximum=1 << 40,
        unit="bytes",
    )
    response_ttl: str = option(
        "24h", "how long such an answer is kept: seconds, 5m, 1h30m; -1: as long as there is room", metavar="DURATION"
    )
    files_dir: str = option(
        "", "folder of uploaded files and of batches; default: one in the home of the models", metavar="DIR"
    )
    files_bytes: int = option(
        4 << 30, "most bytes of files there; a key may have half", minimum=0, maximum=1 << 50, unit="bytes"
    )
    drain_timeout: float = option(30.0, "seconds that running requests get after SIGTERM", minimum=0.0, maximum=86400.0)
    drain_delay: float = option(
        0.0,
        "seconds before that in which /ready says 503 and requests are still taken, for balancers",
        minimum=0.0,
        maximum=3600.0,
    )
    request_timeout: float = option(
        30.0,
        "seconds in which a client has to send its request; a large body may take longer, as long as it comes",
        minimum=0.1,
        maximum=86400.0,
    )
    profile_log: str = option("", "append every request's profile to this JSONL file", metavar="FILE")
    kv_events_endpoint: str = option(
        "",
        "publish what happens to cached KV here, for routers (ZeroMQ, the form of vLLM's events)",
        metavar="tcp://HOST:PORT",
        pattern=r"(tcp://\S+:(\d{1,5}|\*)|ipc://\S+)?",
    )
    kv_events_topic: str = option("", "topic of those events; {model} becomes the served name", metavar="TOPIC")
    kv_events_block_size: int = option(16, "tokens of a block in those events", minimum=1, maximum=4096)
    page_dir: str = option("", "folder of the instrumentation pages; default: the runtime folder", metavar="DIR")
    log_level: str = option("info", "how much to log", choices=("debug", "info", "warning", "error"))
    log_format: str = option("text", "form of the lines that are logged", choices=FORMATS)
    log_requests: bool = option(False, "log a line for every request: its id, status, tokens and time")

    def __post_init__(self) -> None:
        """Raises ConfigError for a value that an option cannot have, and for options that contradict each other."""
        for opt in options():
            value = getattr(self, opt.name)
            if value != default_of(opt):
                setattr(self, opt.name, _convert(opt, value, opt.name))
        if self.any_model and self.require_model:
            raise ConfigError("any_model and require_model contradict each other; give one", param="any_model")
        if self.deterministic and self.kv_layout == "unified":
            raise ConfigError(
                "deterministic needs kv_layout streams; in unified the order of cells changes the last bits of sums",
                param="deterministic",
            )
        for key in [*self.api_key, *([self.admin_key] if self.admin_key else [])]:
            check_key(key, "a key")
        if len(set(self.api_key)) < len(self.api_key):
            raise ConfigError("--api-key: two keys are equal; each tenant needs one of its own", param="api_key")
        if self.admin_key in self.api_key:
            message = "--admin-key: it is also an --api-key, so that this client would be an operator"
            raise ConfigError(message, param="admin_key")


def check_key(key: str, source: str) -> None:
    """Raises ConfigError, without the key, for one that no client can send, or that anybody would guess."""
    if not key.strip():
        message = f"{source}: it is empty, as a variable that is not set; leave the option out to run without a key"
        raise ConfigError(message)
    if any(char.isspace() or not char.isprintable() for char in key):
        raise ConfigError(f"{source}: a key may hold no white space and no control characters")


def options() -> list[Field[Any]]:
    """The options in their documented order."""
    return list(fields(ServeConfig))


def option_type(opt: Field[Any]) -> Any:
    """The Python type of an option: str, int, float, bool, or list[str]."""
    return _types()[opt.name]


@functools.cache
def _types() -> dict[str, Any]:
    return typing.get_type_hints(ServeConfig)


def default_of(opt: Field[Any]) -> Any:
    """A fresh default; lists are not shared."""
    return list(opt.default_factory()) if opt.default_factory is not MISSING else opt.default


def load_config(
    flags: Mapping[str, Any] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    file: Path | None = None,
    where: str = "--",
) -> ServeConfig:
    """Merge flags over environment over file over defaults, and check every value.

    ``flags`` holds only what the user gave; ``where`` is put before their names in errors. Raises ConfigError naming
    the option, where it came from, and what would be right.
    """
    env = os.environ if env is None else env
    known = {opt.name: opt for opt in options()}
    values: dict[str, Any] = {}
    if file is None and env.get(f"{ENV_PREFIX}CONFIG"):
        file = Path(env[f"{ENV_PREFIX}CONFIG"])
    if file is not None:
        for name, value in _read_file(file).items():
            key = name.replace("-", "_")
            if key not in known:
                raise ConfigError(f"{file}: unknown option '{name}'", param=name)
            values[key] = _convert(known[key], value, f"{file}: {name}")
    for key, opt in known.items():
        text = env.get(f"{ENV_PREFIX}{key.upper()}")
        if text is not None:
            values[key] = _convert(opt, text, f"{ENV_PREFIX}{key.upper()}")
    for name, value in (flags or {}).items():
        key = name.replace("-", "_") if isinstance(name, str) else name
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"{where}{name}: there is no such option{hint}", param=str(name))
        shown = key.replace("_", "-") if where == "--" else key
        values[key] = _convert(known[key], value, f"{where}{shown}")
    return ServeConfig(**values)


def unknown_variables(env: Mapping[str, str] | None = None) -> list[str]:
    """What of the environment looks like an option of ours and is none: a sentence each, with what may be meant."""
    import difflib

    known = {f"{ENV_PREFIX}{opt.name.upper()}" for opt in options()} | OTHER_VARIABLES
    found = []
    for name in sorted(os.environ if env is None else env):
        if name.startswith(ENV_PREFIX) and name not in known:
            near = difflib.get_close_matches(name[len(ENV_PREFIX) :], [one[len(ENV_PREFIX) :] for one in known], n=1)
            meant = f"; is {ENV_PREFIX}{near[0]} meant?" if near else ""
            found.append(f"the variable {name} is not known{meant}")
    return found


def _read_file(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from None


_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


def _size(opt: Field[Any], text: str, source: str) -> str:
    """``8GB`` and ``4k`` in digits; what is none is left for the checks of plain numbers."""
    if re.fullmatch(r"\s*[+-]?\d*\s*", text):
        return text
    unit = opt.metadata["unit"]
    try:
        return str(parse_size(text, binary=unit == "tokens"))
    except ValueError:
        right = "8GB or 512MiB" if unit == "bytes" else "4096 or 4k"
        raise ConfigError(f"{source}: '{text}' is not a number of {unit}, as {right}", param=opt.name) from None


def _list_of(text: str) -> list[Any]:
    """Texts between commas, or a JSON list, for those that hold a comma themselves."""
    if text.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            found = json.loads(text)
            if isinstance(found, list):
                return found
    return [part.strip() for part in text.split(",")]


def _convert(opt: Field[Any], value: Any, source: str) -> Any:
    """Check one value and bring it to the option's type."""
    wanted = option_type(opt)
    meta = opt.metadata
    if meta.get("unit") and isinstance(value, str) and value != "auto":
        value = _size(opt, value, source)
    if wanted is bool:
        if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
            value = value.lower() in _TRUE
        if not isinstance(value, bool):
            raise ConfigError(f"{source}: '{value}' is not true or false", param=opt.name)
    elif wanted in (int, float):
        try:
            # A TOML file may say 4096.5 or inf; int() would cut the one and choke on the other.
            if isinstance(value, bool) or (wanted is int and isinstance(value, float) and not value.is_integer()):
                raise ValueError
            value = wanted(value)
        except (TypeError, ValueError, OverflowError):
            kind = "a whole number" if wanted is int else "a number"
            raise ConfigError(f"{source}: '{value}' is not {kind}", param=opt.name) from None
        low, high = meta.get("minimum"), meta.get("maximum")
        if value != value or (low is not None and value < low) or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ConfigError(f"{source}: {value} is out of range; it must be {bounds}", param=opt.name)
    elif wanted == list[str]:
        if isinstance(value, str):
            parts = _list_of(value)
            value = parts if meta.get("secret") else [part for part in parts if part]
        if isinstance(value, dict) and all(isinstance(table, dict) for table in value.values()):  # [sampling.NAME]
            value = [" ".join([name, *(f"{key}={one}" for key, one in table.items())]) for name, table in value.items()]
        if not isinstance(value, list | tuple) or not all(isinstance(part, str) for part in value):
            raise ConfigError(f"{source}: expected a list of texts", param=opt.name)
        value = list(value)
    elif not isinstance(value, str):
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        else:
            raise ConfigError(f"{source}: expected a text", param=opt.name)
    if meta.get("secret"):
        return _keys(opt, value, source)
    pattern = meta.get("pattern")
    for one in value if isinstance(value, list) else [value]:
        if pattern and not re.fullmatch(pattern, one):
            raise ConfigError(f"{source}: '{one}' does not fit; it must look like {meta['metavar']}", param=opt.name)
    choices = meta.get("choices")
    if choices and value not in choices:
        raise ConfigError(f"{source}: '{value}' is not one of {', '.join(choices)}", param=opt.name)
    return value


def _keys(opt: Field[Any], value: str | list[str], source: str) -> Any:
    """Keys as they are given, or from the files that ``@FILE`` names, one a line. Never shown in an error."""
    found = [key for text in ([value] if isinstance(value, str) else value) for key in _keys_in(text, source)]
    for key in found:
        check_key(key, source)
    if isinstance(value, list):
        return found
    if len(found) != 1:
        raise ConfigError(f"{source}: the file must hold one key, it has {len(found)}", param=opt.name)
    return found[0]


def _keys_in(text: str, source: str) -> list[str]:
    if not text.startswith("@"):
        return [text]
    try:
        lines = Path(text[1:]).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{source}: cannot read the key file {text[1:]}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{source}: the key file {text[1:]} is not UTF-8") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{source}: the key file {text[1:]} holds no key")
    return keys
