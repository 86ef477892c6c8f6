"""Which file a benchmark's ``--model`` means."""

from __future__ import annotations

import subprocess
from pathlib import Path

DEFAULT_MODEL = "smollm2:135m"


class NoModel(RuntimeError):
    """The reference names no file; the message says what to do."""


def model_file(reference: str) -> Path:
    """The GGUF file behind a path or a name in mullama's store; the peers need the file. Downloads nothing.

    Raises NoModel.
    """
    path = Path(reference)
    if path.is_file():
        return path.resolve()
    from mullama.errors import MullamaError
    from mullama.models.resolve import resolve_model

    try:
        return resolve_model(reference, pull=False).path.resolve()
    except MullamaError as error:
        raise NoModel(f"{error}; run 'mullama pull {reference}' or give --model FILE") from None


def quantized(model: Path, scheme: str, quantize: Path, folder: Path) -> Path:
    """A requantised copy of the model (``Q8_0`` and so on), made once with llama-quantize. Raises NoModel."""
    target = folder / f"{model.stem}-{scheme}.gguf"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".part")
    done = subprocess.run(
        [str(quantize), "--allow-requantize", str(model), str(partial), scheme],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        partial.unlink(missing_ok=True)
        raise NoModel(f"{quantize.name} could not make {scheme}: {done.stderr[-500:]}")
    partial.rename(target)
    return target
