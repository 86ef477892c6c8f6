"""Log-probabilities in the words of the APIs: OpenAI's chat and completions, vLLM's of prompts, and token ids."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mullama.types import Finish, TokenScore

#: JSON has no infinities; OpenAI and vLLM send this for what cannot come.
LEAST = -9999.0

#: The tokens of a prompt as an answer shows them: the first has no log-probability.
PromptScores = Sequence[TokenScore]


@functools.lru_cache(1 << 15)  # PERF: the same tokens come again and again
def _spelled(piece: bytes) -> tuple[str, list[int]]:
    """A token's text and its bytes, as in OpenAI's chat: what is no text is spelled byte by byte."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        text = "".join(f"\\x{byte:02x}" for byte in piece)
    return text, list(piece)


@functools.lru_cache(1 << 15)
def _text_of(piece: bytes) -> str:
    """A token's text as in OpenAI's completions, where two tokens of other bytes have other texts."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


@functools.lru_cache(1 << 15)
def _width(piece: bytes) -> int:
    """Characters that begin in it."""
    return sum(byte & 0xC0 != 0x80 for byte in piece)


def _number(logprob: float | None) -> float:
    return LEAST if logprob is None or not logprob > LEAST else logprob


@dataclass(slots=True, frozen=True)
class TokenWish:
    """What a request wants to know of tokens, beside their text.

    ``n_top``: log-probabilities of each and of so many most likely ones, None: none; ``n_prompt``: the same of its
    prompt's, as vLLM spells them. ``echoes``: those of the prompt stand before those of the text, as the prompt does.
    """

    n_top: int | None = None
    n_prompt: int | None = None
    echoes: bool = False
    ids: bool = False
    as_ids: bool = False  # tokens are spelled by their ids

    @property
    def any_of_text(self) -> bool:
        return self.n_top is not None or self.ids

    @property
    def n_prompt_scored(self) -> int | None:
        """How many are wanted of each token of the prompt, whoever shows them."""
        wanted = [n for n in (self.n_prompt, self.n_top if self.echoes else None) if n is not None]
        return max(wanted, default=None)

    @property
    def scores_prompt(self) -> bool:
        return self.n_prompt is not None or (self.echoes and self.n_top is not None)

    @property
    def any_of_prompt(self) -> bool:
        return self.scores_prompt or self.ids

    # -- members of a choice

    def of_chat(self, tokens: Sequence[TokenScore]) -> dict[str, Any]:
        """``logprobs`` of a chat's choice, and ``token_ids``."""
        found: dict[str, Any] = {"logprobs": None}
        if self.n_top is not None:
            content = [
                {
                    **self._chat_token(one.token, one.piece, one.logprob),
                    "top_logprobs": [self._chat_token(*other) for other in one.top[: self.n_top]],
                }
                for one in tokens
            ]
            found["logprobs"] = {"content": content, "refusal": None}
        if self.ids:
            found["token_ids"] = [one.token for one in tokens]
        return found

    def _chat_token(self, token: int, piece: bytes, logprob: float | None) -> dict[str, Any]:
        text, data = _spelled(piece)
        return {"token": f"token_id:{token}" if self.as_ids else text, "logprob": _number(logprob), "bytes": data}

    def of_text(self, tokens: Sequence[TokenScore], offset: int, prompt: PromptScores = ()) -> dict[str, Any]:
        """``logprobs`` of a completion's choice, and ``token_ids``. ``offset``: where the first token begins in the
        text; ``prompt``: what is echoed before."""
        found: dict[str, Any] = {"logprobs": None}
        if self.n_top is not None:
            found["logprobs"] = self._completion([*prompt, *tokens], offset)
        if self.ids:
            found["token_ids"] = [one.token for one in tokens]
        return found

    def _completion(self, tokens: Sequence[TokenScore], offset: int) -> dict[str, list[Any]]:
        texts: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for one in tokens:
            texts.append(self._text(one.token, one.piece))
            offsets.append(offset)
            offset += _width(one.piece)
            if one.logprob is None:  # the first of a prompt
                logprobs.append(None)
                tops.append(None)
                continue
            logprobs.append(_number(one.logprob))
            # The token itself is among them, also where it is none of the most likely (vLLM, lm-eval); of two tokens
            # with one text the likelier counts.
            top = {self._text(one.token, one.piece): _number(one.logprob)}
            for token, piece, logprob in one.top[: self.n_top]:
                text = self._text(token, piece)
                top[text] = max(_number(logprob), top.get(text, LEAST))
            tops.append(top)
        return {"text_offset": offsets, "token_logprobs": logprobs, "tokens": texts, "top_logprobs": tops}

    def _text(self, token: int, piece: bytes) -> str:
        return f"token_id:{token}" if self.as_ids else _text_of(piece)

    # -- members about a prompt

    def of_prompt(self, prompt: PromptScores, ids: Sequence[int]) -> dict[str, Any]:
        """vLLM's ``prompt_logprobs`` and ``prompt_token_ids``."""
        found: dict[str, Any] = {}
        if self.n_prompt is not None:
            found["prompt_logprobs"] = [None if one.logprob is None else self._ranked(one) for one in prompt]
        if self.ids:
            found["prompt_token_ids"] = list(ids)
        return found

    def _ranked(self, one: TokenScore) -> dict[str, Any]:
        ranked = {one.token: (one.piece, one.logprob, one.rank)}
        for rank, (token, piece, logprob) in enumerate(one.top[: self.n_prompt], 1):
            ranked[token] = (piece, logprob, rank)
        return {
            str(token): {"logprob": _number(logprob), "rank": rank, "decoded_token": _spelled(piece)[0]}
            for token, (piece, logprob, rank) in ranked.items()
        }


#: Text is all that is told.
NOTHING = TokenWish()


def width(tokens: Sequence[TokenScore]) -> int:
    """Characters that the tokens take, as ``text_offset`` counts them."""
    return sum(_width(one.piece) for one in tokens)


def ended_by(finish: Finish) -> dict[str, int]:
    """vLLM's ``stop_reason``, where one of ``stop_token_ids`` ended the text."""
    return {} if finish.stop_token is None else {"stop_reason": finish.stop_token}


def picked(choices: Sequence[Sequence[TokenScore]], n: int, n_shown: int) -> list[int]:
    """The choices that are shown of ``n`` a prompt: all, or the likeliest by the mean of their log-probabilities."""
    if n_shown == n:
        return list(range(len(choices)))

    def mean(index: int) -> float:
        tokens = choices[index]
        return sum(_number(one.logprob) for one in tokens) / max(len(tokens), 1)

    found: list[int] = []
    for first in range(0, len(choices), n):
        found += sorted(range(first, first + n), key=lambda index: -mean(index))[:n_shown]
    return found
