"""From a model file and a configuration to a Model and a Core."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mullama import abi, faults
from mullama._core import Core, Embedder, Model, chat_template_names, devices, llama_cpp_version
from mullama._core.kernels.products import weights_by_layout
from mullama.config import ServeConfig
from mullama.engine.memory import fits, sizing
from mullama.engine.weights import sharing
from mullama.errors import ConfigError, InvalidRequest, LoadCancelled, ModelLoadError
from mullama.files import count_of
from mullama.home import expand
from mullama.kv.cache import KvCache
from mullama.kv.tiers.disk_records import Identity
from mullama.kv.tiers.disk_store import DiskStore
from mullama.kv.tiers.disk_tier import DiskTier
from mullama.machine import kernels, memory, ways
from mullama.machine.cores import usable_threads
from mullama.machine.trials import ATTENTION
from mullama.models.files import gguf
from mullama.models.files.matrices import matrices
from mullama.types import ModelInfo

try:
    import fcntl
except ImportError:  # Windows, where a page goes with its process
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("mullama.engine")

#: Models that are loaded, with the types of their matrices: what computes these must not change.
_loaded: weakref.WeakKeyDictionary[Model, frozenset[int]] = weakref.WeakKeyDictionary()
_loaded_lock = threading.Lock()


def load_model(path: str | Path, config: ServeConfig, progress: Callable[[float], bool | None] | None) -> Model:
    """Load the weights, or share those of the same file that are loaded. Raises ModelLoadError with the reason."""
    template = chat_template(config.chat_template)
    kinds = frozenset[int]() if config.deterministic else choose_kernels(path, config)
    key = sharing.key_of(path, config)
    model = sharing.find(key, chat_template=template)
    if model is not None:
        log.info("%s: its weights are loaded already, and are shared", path)
    else:
        model = _load(path, config, template, progress)
        sharing.note(key, model)
    with _loaded_lock:
        _loaded[model] = kinds
    try:
        if progress is not None and progress(1.0) is False:
            raise LoadCancelled(f"{path}: loading was cancelled")
        _check_template(model, str(path), is_own=not template)
    except BaseException:
        model.close()
        raise
    return model


def _load(
    path: str | Path, config: ServeConfig, template: str, progress: Callable[[float], bool | None] | None
) -> Model:
    gpus = [d for d in devices() if d["type"] in ("gpu", "igpu") and (not config.device or d["name"] in config.device)]
    gpu_layers = -1
    if config.gpu_layers != "auto" or gpus:
        with_gpu = sum(d["memory_free"] for d in gpus) if gpus else None
        vocab = Model(path, vocab_only=True)
        meta = vocab.metadata()
        n_layer = int(meta.get(f"{meta.get('general.architecture')}.block_count", 1))
        vocab.close()
        kv = fits.token_bytes_of(path, config) * (config.ctx_size or sizing.DEFAULT_CTX) * (config.parallel or 1)
        gpu_layers = sizing.fit_gpu_layers(config.gpu_layers, n_layer, Path(path).stat().st_size, kv, with_gpu)
    try:
        split = [float(part) for part in config.tensor_split.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"tensor_split must be numbers such as 3,1; got '{config.tensor_split}'") from None
    faults.crash_point("load:before-weights")
    model = Model(
        path,
        repack=not config.deterministic,  # the reference computations are for weights as they lie in the file
        gpu_layers=gpu_layers,
        devices=config.device,
        split_mode=config.split_mode,
        tensor_split=split,
        mmap=config.mmap,
        chat_template=template,
        progress=progress,
    )
    faults.crash_point("load:after-weights")
    return model


def choose_kernels(path: str | Path, config: ServeConfig) -> frozenset[int]:
    """Have the ways of computing these weights in charge that are right and fast here. Raises ModelLoadError.

    Returns the types of weights that it is about. Seconds where this machine has not computed such weights with this
    build before, else nothing to speak of.
    """
    weights = matrices(gguf.check(path))
    kernels.prepare(weights, named=config.kernels, in_use=_types_in_use)
    return frozenset((ATTENTION, *(each.type for each in weights)))


def _types_in_use() -> set[int]:
    with _loaded_lock:
        return {kind for model, kinds in _loaded.items() if model.is_open for kind in kinds}


def chat_template(value: str) -> str:
    """The template that the option names: itself, one of llama.cpp's own, or what is in @FILE. Raises ConfigError."""
    if not value.startswith("@"):
        if not value or "{" in value:
            return value
        names = chat_template_names()
        if value.lower() in names:
            return value.lower()
        file = f"; for the file of that name write @{value}" if Path(value).is_file() else ""
        raise ConfigError(
            f"'{value[:80]}' is not a chat template: it must be Jinja, @FILE, or one of {', '.join(names)}{file}",
            param="chat_template",
        )
    try:
        text = Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template {value[1:]}: {error}", param="chat_template") from None
    if "{" not in text:
        raise ConfigError(f"{value[1:]} holds no chat template: nothing in it is Jinja", param="chat_template")
    return text


def _check_template(model: Model, name: str, *, is_own: bool) -> None:
    """A template that writes nothing of the messages would answer every chat alike: with ``is_own`` of the model that
    is logged, else it raises ConfigError."""
    word = "mullama-template-check"
    try:
        text = model.render_chat(json.dumps([{"role": "user", "content": word}]).encode())
    except InvalidRequest:
        return  # it wants other messages, and says so to those who send these
    if word in text:
        return
    if not is_own:
        raise ConfigError("the chat template writes nothing of the messages into the prompt", param="chat_template")
    log.warning("%s: its chat template writes nothing of the messages into the prompt", name)


def make_core(
    model: Model, name: str, config: ServeConfig, *, sizes: sizing.Sizes | None = None, quick: bool = False
) -> Core:
    """A context with its instrumentation page in the runtime folder. ``quick``: see Core.

    ``sizes`` are those that ``fits.sizes_for`` found before the weights were loaded. Raises ModelLoadError.
    """
    facts = model.facts()
    if sizes is None:
        choose = sizing.fit_sizes if config.memory_check == "on" else sizing.choose_sizes
        sizes = choose(
            config.ctx_size,
            config.parallel,
            facts["n_ctx_train"],
            fits.token_bytes_of(model.path, config),
            memory.available_memory(),
        )
    if facts["n_ctx_train"] and sizes.n_ctx > facts["n_ctx_train"]:
        log.warning(
            "%s was trained on %d tokens of context, %d were asked for", name, facts["n_ctx_train"], sizes.n_ctx
        )
    core = Core(
        model,
        n_slots=sizes.n_parallel,
        n_ctx=sizes.n_ctx,
        n_batch=config.batch_size,
        n_threads=config.threads or usable_threads(),
        threads_fixed=config.threads_fixed,
        flash_attn=config.flash_attn,
        type_k=config.kv_type_k,
        type_v=config.kv_type_v,
        reference=config.deterministic,
        unified_cells=0 if config.kv_layout == "streams" else config.kv_tokens or sizes.n_ctx * sizes.n_parallel,
        page_path=_page_path(name, config.page_dir),
        page_needed=bool(config.page_dir),
        quick=quick,
    )
    if not core.page.path:
        log.warning(
            "%s: the instrumentation page is this process's own, for no folder takes it; name one with --page-dir", name
        )
    faults.crash_point("load:after-context")
    return core


def make_embedder(model: Model, name: str, config: ServeConfig, *, n_ctx: int, ranks: bool, quick: bool) -> Embedder:
    """The same of a model that embeds, for texts of ``n_ctx`` tokens. Raises ModelLoadError."""
    return Embedder(
        model,
        n_ctx=n_ctx,
        n_batch=config.batch_size,
        ranks=ranks,
        n_threads=config.threads or usable_threads(),
        threads_fixed=config.threads_fixed,
        flash_attn=config.flash_attn,
        reference=config.deterministic,
        page_path=_page_path(name, config.page_dir),
        page_needed=bool(config.page_dir),
        quick=quick,
    )


def open_disk_tier(
    model: Model, core: Core, kv: KvCache, config: ServeConfig, post: Callable[[Callable[[], None]], None]
) -> DiskTier | None:
    """The disk tier that the configuration asks for, with what it still holds. Raises StoreError."""
    started = time.monotonic()
    store = open_disk_store(model, core, kv, config)
    if store is None:
        return None
    tier = join_disk_store(store, kv, post)
    log.info(
        "%s: %d MiB of KV found in %s (%.2f s)", model.path, store.bytes_used >> 20, config.kv_disk_dir,
        time.monotonic() - started,
    )  # fmt: skip
    return tier


def join_disk_store(store: DiskStore, kv: KvCache, post: Callable[[Callable[[], None]], None]) -> DiskTier:
    """A tier of what a store holds. Engine thread, or before there is one."""
    return DiskTier(store, kv.tree, lambda: kv.host.policy, kv.cells.token_bytes, post, kv.leaves_disk)


def open_disk_store(model: Model, core: Core, kv: KvCache, config: ServeConfig) -> DiskStore | None:
    """The folder of the disk tier, for KV of these weights; None where there is to be none. Raises StoreError."""
    if not config.kv_disk_dir or not kv.cells.can_store:
        return None
    identity = Identity(
        weights=_weights_digest(Path(model.path)),
        architecture=model.facts()["architecture"],
        kv_type_k=config.kv_type_k,
        kv_type_v=config.kv_type_v,
        token_bytes=kv.cells.token_bytes,
        # A checkpoint is llama.cpp's own, which depends on the number of streams.
        layout=f"rows:flash_attn={config.flash_attn}"
        + (":deterministic" if config.deterministic else "")
        + (f":slots={core.n_slots}:unified={core.unified}" if kv.cells.needs_checkpoint else "")
        # Rows do not tell whether llama.cpp rotated them (quantised cells), and this variable of its own decides.
        + (f":unrotated={unrotated}" if (unrotated := os.environ.get("LLAMA_ATTN_ROT_DISABLE")) else ""),
        state_version=llama_cpp_version(),
    )
    return DiskStore(expand(config.kv_disk_dir), config.kv_disk_bytes, identity)


def _weights_digest(path: Path) -> str:
    """What tells these weights from others: the SHA-256 of the file. A store's blob has it in its name."""
    named = re.fullmatch(r"sha256-([0-9a-f]{64})\.gguf", path.name)
    if named:
        return named[1]
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _page_path(name: str, folder: str) -> str | None:
    """Where the page goes; None (a private page) when there is no such folder that is this user's own."""
    base = Path(folder).expanduser()
    try:
        if not folder:
            base = abi.runtime_dir()
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SAFETY: anybody could have made a folder of this name in the temporary one.
        if not folder and hasattr(os, "geteuid") and base.lstat().st_uid != os.geteuid():
            return None
        _sweep(base)
    except OSError as error:
        if folder:
            raise ModelLoadError(f"cannot use the page folder {base}: {error.strerror}") from None
        return None
    return str(base / f"{os.getpid()}-{re.sub(r'[^a-zA-Z0-9._-]', '_', name)}-{time.monotonic_ns():x}.page")


def _sweep(base: Path) -> None:
    """Remove pages of engines that are gone: a killed server leaves its file behind.

    Their process ids say nothing: those of another container, which may share the folder, mean nothing here.
    """
    if fcntl is None:
        return
    for file in base.glob("*.page"):
        if not file.name.split("-", 1)[0].isdigit():
            continue
        # An error: its engine runs; or it is somebody else's, or just gone.
        with contextlib.suppress(OSError), file.open("r+b") as page:
            fcntl.flock(page, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()  # under the lock: an engine that has just made it looks again once it has the lock


def _description(facts: dict[str, Any]) -> str:
    """Such as "llama 135M Q4_1": llama.cpp's own, with the parameters that there are.

    Its second word is the size of the first model that had so many layers, "256M" for one of 135 million.
    """
    name, _, rest = str(facts["description"]).partition(" ")
    _, _, kind = rest.partition(" ")
    return " ".join(filter(None, (name, count_of(facts["n_params"]), kind)))


def info_of(model: Model, core: Core | Embedder, name: str, weights: str = "") -> ModelInfo:
    """``weights``: what tells these weights from others of the same name; the file's stem when it is not given."""
    facts = model.facts()
    return ModelInfo(
        name=name,
        path=model.path,
        description=_description(facts),
        architecture=facts["architecture"],
        n_params=facts["n_params"],
        size_bytes=facts["size_bytes"],
        n_vocab=facts["n_vocab"],
        n_ctx_train=facts["n_ctx_train"],
        n_ctx=core.n_ctx,
        n_parallel=core.n_slots,
        n_layer=facts["n_layer"],
        n_embd=facts["n_embd"],
        n_swa=facts["n_swa"],
        has_chat_template=facts["has_chat_template"],
        is_recurrent=facts["is_recurrent"],
        is_hybrid=facts["is_hybrid"],
        created=int(time.time()),
        can_shift=core.can_shift and not core.unified,
        weights=weights or Path(model.path).stem,
        kernels=ways.ways_of(weights_by_layout(model), reference=core.context.reference),
        mapped_bytes=sum(size for kind, size in core.memory()["weights"].items() if kind.endswith("_Mapped")),
    )
