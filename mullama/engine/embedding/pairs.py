"""Two texts as one prompt for a model that ranks, as llama-server makes it: its rerank template, or what the vocabulary
puts around texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mullama._core import Model

_TEMPLATE = "tokenizer.chat_template.rerank"


class Pairs:
    """Of one model. Any thread."""

    def __init__(self, model: Model) -> None:
        meta = model.metadata()
        self._model = model
        self._template = meta.get(_TEMPLATE, "")
        self.head, self.tail = affixes(model.tokenize("", add_special=True), model.tokenize("a", add_special=True))
        sep = meta.get("tokenizer.ggml.seperator_token_id", "")
        # WordPiece has it behind each text already.
        doubles = meta.get("tokenizer.ggml.add_sep_token") == "true" and meta.get("tokenizer.ggml.model") != "bert"
        self._sep = [int(sep)] if doubles and sep.isdecimal() else []

    def tokens(self, query: str, document: str, most: int | None) -> list[int]:
        """The prompt; a document that is too long for ``most`` tokens is cut."""
        if self._template:
            text = self._template.replace("{query}", query).replace("{document}", document)
            return self._model.tokenize(text, add_special=False)
        first = self._model.tokenize(query, add_special=False, parse_special=False)
        second = self._model.tokenize(document, add_special=False, parse_special=False)
        before = [*self.head, *first, *self.tail, *self._sep]
        if most is not None:
            second = second[: max(most - len(before) - len(self.tail), 0)]
        return [*before, *second, *self.tail]


def affixes(empty: list[int], one: list[int]) -> tuple[list[int], list[int]]:
    """What a vocabulary puts before and behind a text: ``empty`` is all of it, ``one`` has a text between."""
    n = next((i for i, token in enumerate(empty) if token != one[i]), len(empty))
    while n and one[len(one) - (len(empty) - n) :] != empty[n:]:  # pragma: no cover - no vocabulary is known for it
        n -= 1
    return empty[:n], empty[n:]
