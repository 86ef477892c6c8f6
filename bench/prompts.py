"""Seeded, unique, natural-looking prompts of an exact token count.

The texts are small English sentences of common words, each of which is one token in the vocabularies of current
models, so a text's length is nearly known before it is tokenised. ``PromptMaker`` asks a counter (the engine's or a
server's tokenizer) and corrects; without one (mullama has no tokenise endpoint) ``PromptMaker.calibrated`` drops the
words that are not one token, and the run verifies against ``usage.prompt_tokens``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Counter = Callable[[str], int]  # tokens of a text, special ones such as BOS included


def _split(text: str) -> list[str]:
    return text.split()


OPENERS = _split("The When Every Some After Before Their Our Many This That One")
NOUNS = _split(
    "river house garden letter city road book table window water mountain teacher student farmer doctor child "
    "family village street school market church bridge forest island ship train car horse dog bird fish tree flower "
    "stone fire light night morning summer winter spring rain snow wind sun moon star music song story picture word "
    "paper door wall room kitchen bread wine coffee milk sugar salt food fruit field hill valley lake sea ocean boat "
    "king queen soldier friend neighbor brother sister mother father son daughter man woman people world country "
    "town work job plan idea question answer problem game team player army law state church office machine engine"
)
ADJECTIVES = _split(
    "small large old young new quiet green blue red white black dark bright cold warm long short high deep wide "
    "strong weak happy sad kind good bad rich poor clean fresh dry wet soft hard heavy light early late slow quick "
    "strange simple great little big open empty full local public private modern ancient common special"
)
VERBS = _split(
    "carries finds leaves follows remembers keeps watches crosses meets brings builds opens closes moves holds "
    "shows sees hears takes gives makes needs wants loves knows likes helps calls asks tells reads writes sells buys"
)
LINKS = _split("across near behind under above beside through around into before after from with without for")
DETERMINERS = _split("the a this that every some another their our his her")


def words() -> list[str]:
    """Every word a prompt may hold, each once, in a fixed order."""
    return list(dict.fromkeys([*OPENERS, *NOUNS, *ADJECTIVES, *VERBS, *LINKS, *DETERMINERS]))


def _pieces(rng: random.Random, allowed: frozenset[str]) -> list[str]:
    """One sentence as pieces that are expected to be one token each: `` word`` or ``.``."""

    def pick(group: Sequence[str]) -> str:
        return " " + rng.choice([word for word in group if word in allowed])

    def thing() -> list[str]:
        return [pick(DETERMINERS), pick(ADJECTIVES), pick(NOUNS)]

    return [
        *(pick(OPENERS), pick(ADJECTIVES), pick(NOUNS)),
        *(pick(VERBS), *thing(), pick(LINKS), *thing()),
        ".",
    ]


def single_token_words(count: Counter, candidates: Sequence[str]) -> list[str]:
    """The candidates that are one token after a space, found by halving: few calls when nearly all are.

    Relies on tokenizers that never merge across a space, as byte-pair and SentencePiece vocabularies do not.
    """
    lead = "."
    base = count(lead)

    def check(group: Sequence[str]) -> list[str]:
        if not group:
            return []
        if count(lead + "".join(" " + word for word in group)) - base == len(group):
            return list(group)
        if len(group) == 1:
            return []
        middle = len(group) // 2
        return check(group[:middle]) + check(group[middle:])

    return check(candidates)


class PromptMaker:
    """Makes prompts of exactly ``n`` tokens; no two share their first four words.

    With ``count`` every prompt is checked and corrected by whole words, and a length that cannot be reached
    raises ValueError. Without it the length is an estimate (``overhead`` = special tokens such as BOS).
    The first piece is a noun, so even the first tokens of two prompts differ nearly always.
    """

    def __init__(
        self, seed: int, count: Counter | None = None, *, allowed: Sequence[str] | None = None, overhead: int = 0
    ) -> None:
        self._rng = random.Random(seed)
        self._count = count
        self._overhead = overhead
        self._allowed = frozenset(words() if allowed is None else allowed)
        self._seen: set[str] = set()

    @classmethod
    def calibrated(cls, seed: int, count: Counter) -> PromptMaker:
        """For a counter that costs a request a call: asks it a few times now and never again."""
        allowed = single_token_words(count, words())
        noun = next(word for word in NOUNS if word in allowed)
        return cls(seed, allowed=allowed, overhead=count(" " + noun) - 1)

    def make(self, n_tokens: int) -> str:
        if n_tokens < self._overhead + 5:
            raise ValueError(f"a prompt needs at least {self._overhead + 5} tokens to be unique, not {n_tokens}")
        nouns = [word for word in NOUNS if word in self._allowed]
        while True:
            pieces = [" " + self._rng.choice(nouns)]
            while len(pieces) < n_tokens:
                pieces += _pieces(self._rng, self._allowed)
            key = "".join(pieces[:4])
            if key in self._seen:
                continue
            self._seen.add(key)
            if self._count is None:
                return "".join(pieces[: n_tokens - self._overhead])
            exact = self._fit(pieces, n_tokens, self._count)
            if exact is not None:
                return exact

    def many(self, n_prompts: int, n_tokens: int) -> list[str]:
        return [self.make(n_tokens) for _ in range(n_prompts)]

    @staticmethod
    def _fit(pieces: list[str], n_tokens: int, count: Counter) -> str | None:
        """The longest prefix of the pieces that has exactly ``n_tokens``, or None when a word steps over it."""
        kept = n_tokens
        for _ in range(8):
            text = "".join(pieces[:kept])
            excess = count(text) - n_tokens
            if excess == 0:
                return text
            kept -= excess
            if not 4 <= kept <= len(pieces):
                return None
        return None
