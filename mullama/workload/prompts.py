"""Prompts of exact lengths, as token ids, for the requests of a workload: seeded, and shared only where they should be.

Two requests share a prefix when, and as far as, they begin with the same block ids. All others differ in their first
token, as long as the vocabulary has twice as many ids as there are requests and blocks, and in their second otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from mullama.errors import InvalidRequest
from mullama.workload.base import TraceRequest

SMALLEST_VOCABULARY = 16


class Prompts:
    """Makes prompts from ``vocabulary``, the token ids that may occur: ordinary words, no control tokens."""

    def __init__(self, vocabulary: Sequence[int], seed: int = 0) -> None:
        if len(vocabulary) < SMALLEST_VOCABULARY:
            raise InvalidRequest(
                f"{len(vocabulary)} ordinary tokens are too few to make prompts of; {SMALLEST_VOCABULARY} are needed"
            )
        self._vocabulary = list(vocabulary)
        random.Random(f"{seed}/vocabulary").shuffle(self._vocabulary)
        self._seed = seed

    def make(self, index: int, request: TraceRequest) -> list[int]:
        """``request.prompt_tokens`` ids for request ``index`` of the workload; the same for the same arguments."""
        prompt: list[int] = []
        for block in request.blocks:
            left = request.prompt_tokens - len(prompt)
            if left <= 0:
                break
            # A block is made whole before it is cut, so that a shorter one is a prefix of a longer one.
            prompt += self._run(f"block/{block}", 2 * block + 1, request.block_tokens)[:left]
        rest = request.prompt_tokens - len(prompt)
        return prompt + self._run(f"request/{index}", 2 * index, rest) if rest > 0 else prompt

    def _run(self, name: str, number: int, length: int) -> list[int]:
        """``length`` ids that begin with ``number`` spelled in ids, so that no two runs begin alike."""
        size = len(self._vocabulary)
        head = [self._vocabulary[number % size], self._vocabulary[number // size % size]][:length]
        return head + random.Random(f"{self._seed}/{name}").choices(self._vocabulary, k=length - len(head))
