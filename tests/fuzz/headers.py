"""GGUF headers as our own reader takes them: refused in one line, or all that is derived from them is sound."""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path

from mullama.cli.store.show import _jsonable, _summary
from mullama.errors import MullamaError
from mullama.models.files import gguf
from mullama.models.files.estimate import check_fits, estimate, fit, token_bytes
from mullama.models.files.lora_file import compare
from mullama.models.files.matrices import matrices
from mullama.models.files.shape import check_sense
from mullama.types import CELL_TYPES

from .gguf_files import KEYS, change_file

#: Processor time that a header of some kilobytes may take in all; instrumented, so a bound for what is out of hand.
MOST_SECONDS = 2.0


class Target:
    words = KEYS

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "m.gguf"

    def __call__(self, data: bytes) -> None:
        self._path.write_bytes(data)
        began = time.thread_time()
        try:
            header = gguf.check(self._path, label="m")
        except MullamaError as error:
            _check_line(error)
            return
        json.dumps(_jsonable({**_summary(header), "metadata": header.metadata}), allow_nan=False)
        assert header.n_params >= 0 and header.data_start >= 0
        for work in (_sizes, _as_model, _as_adapter):
            try:
                work(header)
            except MullamaError as error:
                _check_line(error)
        seconds = time.thread_time() - began
        assert seconds < MOST_SECONDS, f"{len(data)} bytes took {seconds:.1f} s"

    def change(self, rng: random.Random, data: bytes) -> bytes:
        return change_file(rng, data)

    def close(self) -> None:
        self._folder.cleanup()


def _check_line(error: MullamaError) -> None:
    message = str(error)
    assert message.isprintable() and len(message) < 2000, repr(message)


def _sizes(header: gguf.Header) -> None:
    for layout in ("streams", "unified"):
        for flash_attn in ("auto", "off"):
            found = estimate(header, n_ctx=4096, n_parallel=4, kv_layout=layout, flash_attn=flash_attn)
            parts = (found.weights, found.kv_total, found.compute, found.output, found.total)
            assert all(type(one) is int and one >= 0 for one in parts), found
    for kind in CELL_TYPES:
        assert token_bytes(header, kind, kind) >= 0
    for one in fit(header, 1 << 30, n_ctx=2048, n_parallel=2):
        assert one.n_ctx is None or one.n_ctx > 0
    json.dumps(found.to_json())
    check_fits(found, 1 << 30, "m")


def _as_model(header: gguf.Header) -> None:
    check_sense(header, "m")
    for one in matrices(header):
        assert one.k % one.block == 0


def _as_adapter(header: gguf.Header) -> None:
    compare(header, header, "m")
