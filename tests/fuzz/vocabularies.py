"""GGUF headers as llama.cpp takes them, once ours has nothing against them: loaded without weights, and used.

The process may end here; a server opens such a file in a child first. What this target finds is mended all the same.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from pathlib import Path

from mullama._core import Model, set_log_level
from mullama.errors import MullamaError
from mullama.models.files import gguf
from mullama.models.files.shape import check_sense

from .gguf_files import KEYS, change_file

TEXTS = ["", "a", "Hello world", " a  b\n\nc\t", "<s>a</s>", "é漢🙂\u0301", "\0", "1234567", "a" * 300, "<0x41>▁a"]


class Target:
    words = KEYS

    def __init__(self) -> None:
        set_log_level("none")
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "m.gguf"

    def __call__(self, data: bytes) -> None:
        self._path.write_bytes(data)
        try:
            check_sense(gguf.check(self._path, label="m"), "m")
            # ChatML instead of the file's own template, which is another target.
            model = Model(self._path, vocab_only=True, chat_template="chatml")
        except MullamaError:
            return
        try:
            _use(model)
        finally:
            model.close()

    def change(self, rng: random.Random, data: bytes) -> bytes:
        return change_file(rng, data)

    def close(self) -> None:
        self._folder.cleanup()


def _use(model: Model) -> None:
    model.facts()
    model.metadata()
    model.vocab_facts()
    model.vocab_digest()
    model.control_tokens()
    for token in range(min(model.n_vocab, 300)):
        model.piece(token, special=True)
    for text in TEXTS:
        for parse_special in (True, False):
            with contextlib.suppress(MullamaError):
                tokens = model.tokenize(text, parse_special=parse_special)
                assert all(0 <= token < model.n_vocab for token in tokens), (text, tokens)
                model.detokenize_bytes(tokens, special=True)
                model.detokenize_bytes(tokens)
