"""Long texts become tokens in pieces: the same tokens, but the work can pause, and end once there are too many.

A text is cut where a single space stands between two letters. Pre-tokenisers begin a word there, and where no token
of the vocabulary holds a letter with a space behind it, no merge crosses such a place: what is left and right of it is
tokenised as if it stood alone. It is cut as well before a special token (``<|im_start|>``), which is taken out of the
text before its words are looked for; llama.cpp's time for that grows with the square of how many there are.
Vocabularies for which that does not hold, and texts without such places, are tokenised in one go.
"""

from __future__ import annotations

import codecs
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mullama.engine.background import in_background
from mullama.engine.requests.chat_text import ChatText, Part
from mullama.errors import InvalidRequest

if TYPE_CHECKING:
    from mullama._core import Model

#: What clients call a special token, and its name in a model's metadata.
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

#: Characters of a piece: less than a millisecond's work.
PIECE_CHARS = 1000
#: A piece above this many characters, which could not be cut, is worked out at low priority beside others.
LONG_PIECE_CHARS = 20_000
PIECE_NICE = 10  # about a tenth of a core's time beside a busy compute thread
#: Special tokens of a vocabulary that texts are cut before; some have thousands.
MAX_SPECIALS = 256
#: A space between two letters of any script.
_BORDER = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
#: The kinds of vocabulary (tokenizer.ggml.model) that drop and change no byte of a text.
_FAITHFUL = ("gpt2", "llama")


class TooManyTokens(Exception):
    """A text has more tokens than it may: ``n``, or at least so many where it was not looked at to its end."""

    def __init__(self, n: int, *, is_all: bool = False) -> None:
        super().__init__(n)
        self.n = n
        self.is_all = is_all


@dataclass(slots=True, frozen=True)
class _Ways:
    """How a vocabulary may be used."""

    cuts: bool  # whether texts may be cut at all
    eats_space: bool  # the space at a cut goes, because the vocabulary puts one before every text
    longest: int  # no token stands for more bytes; 0: unknown
    vanishing: bytes  # bytes that may have no token
    specials: re.Pattern[str] | None = None  # where a text may be cut, if special tokens are looked for in it


class Tokenizer:
    """Tokenises with a Model, in pieces. Any thread.

    ``model()`` is asked for each piece, so that the weights may change meanwhile: the vocabulary stays.
    """

    def __init__(self, model: Callable[[], Model], *, piece_chars: int = PIECE_CHARS) -> None:
        self._get_model = model
        self._piece_chars = piece_chars
        self._ways: _Ways | None = None  # found out for the first long text: it takes a few milliseconds
        self._lock = threading.Lock()

    def tokenize(
        self,
        text: str,
        *,
        add_special: bool = True,
        parse_special: bool = True,
        most: int | None = None,
        between: Callable[[], None] | None = None,
    ) -> list[int]:
        """The tokens of ``Model.tokenize``. ``between`` is called between two pieces, outside of all locks; without it
        nothing is made room for.

        Raises TooManyTokens as soon as there are surely more than ``most``, InvalidRequest for lone surrogates.
        """

        if isinstance(text, ChatText):
            if parse_special and text.parts:
                return self._in_parts(text.parts, add_special, most, between)
            text = str(text)  # the core takes no other kind

        def work_out(piece: str, add_special: bool) -> list[int]:
            def work() -> list[int]:
                return self._model.tokenize(piece, add_special=add_special, parse_special=parse_special)

            is_long = between is not None and len(piece) > LONG_PIECE_CHARS
            return in_background(work, nice=PIECE_NICE) if is_long else work()

        if len(text) <= self._piece_chars:
            return _checked(work_out(text, add_special), most)
        ways = self.ways()
        if most is not None and ways.longest:
            n_least = -(-_lasting_bytes(text, ways.vanishing) // ways.longest)
            if n_least > most:
                raise TooManyTokens(n_least)
        if not ways.cuts:
            return _checked(work_out(text, add_special), most)
        head, tail = self._affixes() if add_special else ([], [])
        tokens = list(head)
        border = (ways.specials or _BORDER) if parse_special else _BORDER
        for i, piece in enumerate(pieces(text, self._piece_chars, eats_space=ways.eats_space, border=border)):
            if i and between is not None:
                between()
            tokens += work_out(piece, False)
            if most is not None and len(tokens) > most:
                raise TooManyTokens(len(tokens))
        return _checked(tokens + tail, most)

    def _in_parts(
        self, parts: Sequence[Part], add_special: bool, most: int | None, between: Callable[[], None] | None
    ) -> list[int]:
        head, tail = self._affixes() if add_special else ([], [])
        tokens = list(head)
        for i, (part, parse_special) in enumerate(parts):
            left = None if most is None else most - len(tokens) - len(tail)
            try:
                tokens += self.tokenize(
                    part, add_special=False, parse_special=parse_special, most=left, between=between
                )
            except TooManyTokens as error:
                is_all = error.is_all and i == len(parts) - 1
                raise TooManyTokens(error.n + len(tokens) + len(tail), is_all=is_all) from None
        return tokens + tail

    @property
    def _model(self) -> Model:
        return self._get_model()

    def ways(self) -> _Ways:
        with self._lock:
            if self._ways is None:
                self._ways = self._find_ways()
            return self._ways

    def _find_ways(self) -> _Ways:
        if self._model.metadata().get("tokenizer.ggml.model") not in _FAITHFUL:
            return _Ways(cuts=False, eats_space=False, longest=0, vanishing=b"")
        facts = self._model.vocab_facts()
        vanishing = bytes(byte for byte, token in enumerate(facts["byte_tokens"]) if token < 0)

        def tokens(text: str) -> list[int]:
            return self._model.tokenize(text, add_special=False)

        whole = tokens("in a")
        cuts = not facts["joins"]
        eats_space = False
        if whole != tokens("in") + tokens(" a"):
            eats_space = whole == tokens("in") + tokens("a")
            cuts = cuts and eats_space
        return _Ways(cuts, eats_space, facts["longest"], vanishing, _border_of(facts["specials"]))

    def bytes_alone(self, data: bytes) -> list[int]:
        """The token of each byte, as for a character that has only begun; nothing when a byte has none."""
        known = self._model.vocab_facts()["byte_tokens"]
        tokens = [known[byte] for byte in data]
        return tokens if min(tokens, default=0) >= 0 else []

    def _affixes(self) -> tuple[list[int], list[int]]:
        """The tokens that the vocabulary puts before and behind every text."""
        plain = self._model.tokenize("a", add_special=False)
        marked = self._model.tokenize("a", add_special=True)
        for at in range(len(marked) - len(plain) + 1):
            if marked[at : at + len(plain)] == plain:
                return marked[:at], marked[at + len(plain) :]
        raise AssertionError("a text is not part of itself")  # pragma: no cover


def text_of(model: Model, tokens: Sequence[int], *, special: bool = False, only_whole: bool = False) -> str:
    """What EngineClient.detokenize gives."""
    if only_whole:
        data = model.detokenize_bytes(tokens, special=special)
        return codecs.getincrementaldecoder("utf-8")("replace").decode(data)
    return model.detokenize(tokens, special=special)


def vocabulary_of(model: Model) -> dict[str, Any]:
    """What EngineClient.vocabulary gives."""
    found: dict[str, Any] = {"chat_template": model.chat_template()}
    for name, key in SPECIAL_TOKENS.items():
        token = model.metadata().get(f"tokenizer.ggml.{key}_token_id", "")
        known = token.isdecimal() and int(token) < model.n_vocab
        found[name] = model.piece(int(token), special=True).decode("utf-8", "replace") if known else None
    return found


def _border_of(specials: Sequence[bytes]) -> re.Pattern[str] | None:
    """Where texts may be cut: at words, and before those special tokens that no other one can reach over.

    None: at words only. A token reaches over a place where it holds the character that stands there further on.
    """
    texts = [special.decode("utf-8", "replace") for special in specials]
    inside = set("".join(text[1:] for text in texts))
    chosen = [text for text in texts if len(text) > 1 and text[0] not in inside and text[0] in "<["]
    if not chosen:
        return None
    longest_first = sorted(set(chosen), key=lambda text: (-len(text), text))[:MAX_SPECIALS]
    return re.compile(f"{_BORDER.pattern}|(?={'|'.join(map(re.escape, longest_first))})")


def pieces(text: str, size: int, *, eats_space: bool = False, border: re.Pattern[str] = _BORDER) -> Iterator[str]:
    """``text`` in pieces of about ``size`` characters or more, cut before a space between letters, or around it."""
    start = 0
    while (found := border.search(text, start + size)) is not None:
        yield text[start : found.start()]
        start = found.end() if eats_space else found.start()
    yield text[start:]


def _lasting_bytes(text: str, vanishing: bytes) -> int:
    """Bytes of a text that surely become part of a token."""
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("the text holds a lone surrogate, which is not valid Unicode") from None
    return len(data.translate(None, vanishing))


def _checked(tokens: list[int], most: int | None) -> list[int]:
    if most is not None and len(tokens) > most:
        raise TooManyTokens(len(tokens), is_all=True)
    return tokens
