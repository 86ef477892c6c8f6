"""The throw-away process that opens a new model file.

``python -m mullama.models.child.probe_child PATH MEMORY CPU TEMPLATE [ADAPTER]`` tells on stdout, a JSON object a line,
which stage it enters and in the end what it found; where it dies instead, the last stage told is where. MEMORY is in
bytes of address space, CPU and TEMPLATE are in seconds of processor time. ADAPTER is a LoRA adapter that the token is
decoded with; then the template is left alone.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from typing import Any

from mullama import abi
from mullama.child import become_child
from mullama.models.files import gguf
from mullama.models.files.kind import kind_of
from mullama.types import ModelKind, Pooling

#: Stages, in order.
LOAD, DECODE, TEMPLATE = "loading", "decoding one token", "rendering its chat template"
ADAPT = "loading the adapter"  # between the first two, where there is one

N_CTX, N_BATCH = 256, 32
MAX_RENDERED = 1 << 20  # characters of a prompt of three short messages

_MESSAGES = (
    b'[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, '
    b'{"role": "user", "content": "How are you?"}]'
)


def tell(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def main(path: str, memory: int, cpu_s: int, template_s: float, adapter: str = "") -> int:
    """Probe a file. Returns the exit status: 0, whatever was found, as long as it could be told."""
    become_child(niceness=10)
    _limit(memory, cpu_s)
    from mullama.errors import MachineUnfit, MullamaError

    try:
        tell(ok=True, **(_probe_adapter(path, adapter) if adapter else _probe(path, template_s)))
    except MachineUnfit as error:  # the parent has loaded the same libraries, without the limit
        tell(ok=False, reason=f"out of memory: {error.message}", memory=True)
    except MullamaError as error:
        tell(ok=False, reason=error.message)
    except MemoryError:
        tell(ok=False, reason="out of memory", memory=True)
    except ImportError as error:  # the parent has loaded the same libraries, without the limit
        tell(ok=False, reason=f"out of memory: {error}", memory=True)
    except Exception as error:
        # Nothing that a file should cause, so perhaps something of this machine's.
        tell(ok=False, reason=f"{type(error).__name__}: {error}", memory="bad_alloc" in str(error), lasting=False)
    return 0


def _probe(path: str, template_s: float) -> dict[str, Any]:
    model, started = _open(path)
    tell(stage=DECODE, after_ms=_ms(started))
    kind = kind_of(gguf.check(path))
    is_finite = _decode(model) if kind is ModelKind.GENERATE else _embed(model, kind)
    has_template = any(key.startswith("tokenizer.chat_template") for key in model.metadata())
    model.close()
    template = "none"
    if has_template:
        tell(stage=TEMPLATE, after_ms=_ms(started))
        template = _render(path, template_s)
    return {"finite": is_finite, "template": template, "wall_ms": _ms(started)}


def _probe_adapter(path: str, adapter_path: str) -> dict[str, Any]:
    model, started = _open(path)
    from mullama._core import Adapter

    tell(stage=ADAPT, after_ms=_ms(started))
    adapter = Adapter(model, adapter_path)
    tell(stage=DECODE, after_ms=_ms(started))
    is_finite = _decode(model, [(adapter, 1.0)])
    adapter.close()
    model.close()
    return {"finite": is_finite, "template": "none", "wall_ms": _ms(started)}


def _open(path: str) -> tuple[Any, float]:
    """The model, and when its loading began."""
    tell(stage=LOAD)
    from mullama._core import Model
    from mullama.machine import kernels

    kernels.adopt()
    started = time.monotonic()
    # ChatML instead of the file's own template, which has a stage of its own.
    return Model(path, gpu_layers=0, chat_template="chatml"), started


def _decode(model: Any, adapters: Any = ()) -> bool:
    """One token after a short prompt; whether its logits were finite. Raises ModelLoadError for other failures."""
    from mullama._core import FINISH, Core
    from mullama.errors import ModelLoadError
    from mullama.types import SamplingParams

    core = Core(model, n_slots=1, n_ctx=N_CTX, n_batch=N_BATCH, n_threads=1, threads_fixed=True)
    prompt = model.tokenize("Hello")[: N_BATCH // 2] or [0]
    core.open(0, 1, prompt, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True), adapters=adapters)
    core.run([], [(0, len(prompt))], 1)
    records = core.drain_records()
    core.close()
    for record in records:
        if record[0] == FINISH:
            error = record[4]
            if error and abi.CORE_ERRORS.get(error) != "not_finite":
                raise ModelLoadError(f"{model.path}: llama.cpp cannot decode with it (core error {error})")
            return bool(error == 0)
    raise ModelLoadError(f"{model.path}: decoding one token did not end")


def _embed(model: Any, kind: ModelKind) -> bool:
    """The vector of a short text; whether it was finite. Raises ModelLoadError for other failures."""
    from mullama._core import Embedder
    from mullama.errors import ComputeFailed, ModelLoadError

    ranks = kind is ModelKind.RANK
    core = Embedder(model, n_ctx=N_BATCH, ranks=ranks, n_threads=1, threads_fixed=True)
    text = model.tokenize("Hello")[: core.n_ctx] or [0]
    try:
        (vector,) = core.run([(text, Pooling.RANK if ranks else Pooling.MEAN, True)])
    except ComputeFailed as error:
        raise ModelLoadError(f"{model.path}: {error.message}") from None
    finally:
        core.close()
    return vector is not None


def _render(path: str, seconds: float) -> str:
    """What became of the template: "ok", "none", or why it refused the messages (that alone is no damage)."""
    from mullama._core import Model
    from mullama.errors import InvalidRequest, ModelLoadError

    # SAFETY: the template may run for ever in C++; SIGPROF ends the process then, for nobody handles it.
    with contextlib.suppress(AttributeError):
        signal.setitimer(signal.ITIMER_PROF, seconds)
    model = Model(path, vocab_only=True)
    has_own = model.facts()["has_chat_template"]
    try:
        text = model.render_chat(_MESSAGES)
    except InvalidRequest as error:
        return error.message[:300]
    finally:
        with contextlib.suppress(AttributeError):
            signal.setitimer(signal.ITIMER_PROF, 0)
    if len(text) > MAX_RENDERED:
        raise ModelLoadError(
            f"{path}: its chat template makes {len(text)} characters of three short messages; it is broken or hostile"
        )
    return "ok" if has_own else "none"


def _limit(memory: int, cpu_s: int) -> None:
    """Limits of the address space and of processor time; none where the system has no such thing."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))


def _ms(since: float) -> int:
    return round((time.monotonic() - since) * 1000)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), *sys.argv[5:6]))
