"""The interactive chat of ``mullama run``: lines in, replies out, /commands. The terminal itself is passed in."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from mullama.cli.interrupt import on_interrupt
from mullama.cli.settings import SETTINGS
from mullama.cli.table import printable
from mullama.cli.talk.chat import ChatSession, explain
from mullama.errors import ConfigError, EngineDead, InvalidRequest, MullamaError
from mullama.files import write_text
from mullama.home import expand

if TYPE_CHECKING:
    from mullama.types import Profile

FENCE = '"""'
PROMPT, MORE = ">>> ", "... "
GAUGE = 20  # characters of the context's bar

#: Command -> (arguments, help).
COMMANDS: dict[str, tuple[str, str]] = {
    "/help": ("", "this list"),
    "/clear": ("", "forget the conversation"),
    "/system": ("TEXT", "set the system message; without TEXT remove it"),
    "/set": ("NAME VALUE", f"change a setting: {', '.join(SETTINGS)}"),
    "/show": ("", "model, settings, and what the last reply cost"),
    "/save": ("FILE", "write the conversation to FILE as JSON"),
    "/exit": ("", "leave; so does Ctrl-D"),
}


class Repl:
    """``read`` shows a prompt and returns a line, or raises EOFError (Ctrl-D) or KeyboardInterrupt (Ctrl-C).

    ``style(kind, text)`` colours what is no reply: kinds are ``note`` and ``error``.
    """

    def __init__(
        self,
        session: ChatSession,
        read: Callable[[str], str],
        write: Callable[[str], None],
        style: Callable[[str, str], str] = lambda kind, text: text,
    ) -> None:
        self._session = session
        self._read = read
        self._write = write
        self._style = style
        self._was_interrupted = False  # by a Ctrl-C at the prompt, and nothing was read since

    def run(self) -> None:
        """Until /exit or Ctrl-D. Raises EngineDead when no further reply is possible."""
        info = self._session.engine.info
        self._line(f"{info.name} ({info.n_ctx} tokens of context). /help lists the commands, Ctrl-D leaves.")
        while True:
            try:
                text = self._read_message()
            except KeyboardInterrupt:
                if self._was_interrupted:
                    return
                self._was_interrupted = True
                self._line("(Ctrl-C again, Ctrl-D or /exit leaves)")
                continue
            except EOFError:
                return
            if text.startswith(FENCE):
                # What was fenced is never a command: so a message may start with "/".
                text = text.removeprefix(FENCE).removesuffix(FENCE).strip("\n")
            elif text.startswith("/"):
                if not self._command(text):
                    return
                continue
            if text:
                self._reply(text)

    def _read_message(self) -> str:
        """A line, or with its fences everything between \"\"\" and \"\"\"."""
        text = self._read(PROMPT).strip()
        self._was_interrupted = False
        if text.startswith(FENCE):
            while len(text) < 2 * len(FENCE) or not text.endswith(FENCE):
                text += "\n" + self._read(MORE).rstrip()
        return text

    def _reply(self, text: str) -> None:
        session = self._session
        try:
            with on_interrupt(session.cancel):
                for piece in session.ask(text):
                    self._write(printable(piece))
        except EngineDead:
            raise
        except KeyboardInterrupt:  # the second Ctrl-C
            self._write("\n")
            raise
        except MullamaError as error:
            self._line(f"error: {explain(error)}", "error")
            return
        if session.was_cancelled:
            self._write(self._style("note", " (stopped)"))
        self._write("\n")

    def _command(self, text: str) -> bool:
        """Carry out a /command; False: leave."""
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        match name.lower():
            case "/exit" | "/quit" | "/bye":
                return False
            case "/help" | "/?":
                self._help()
            case "/clear":
                self._session.clear()
                self._line("the conversation is forgotten")
            case "/system":
                self._session.system = rest or None
                self._line("the system message is set" if rest else "the system message is removed")
            case "/set":
                self._set(rest)
            case "/show":
                self._show()
            case "/save":
                self._save(rest)
            case _:
                self._line(f"there is no command {printable(name)}; /help lists them")
        return True

    def _help(self) -> None:
        for name, (arguments, text) in COMMANDS.items():
            self._line(f"  {f'{name} {arguments}':<20} {text}")
        self._line(f"  {FENCE:<20} starts a message of several lines, and ends it")
        self._line(f"  {'Ctrl-C':<20} stops a reply")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        try:
            if not value.strip():
                raise InvalidRequest(f"/set needs NAME and VALUE; NAME is one of {', '.join(SETTINGS)}")
            self._session.set(name, value.strip())
        except MullamaError as error:
            self._line(f"error: {error.message}", "error")
        else:
            self._line(f"{name} is {value.strip()}")

    def _show(self) -> None:
        session = self._session
        info = session.engine.info
        sampling = session.sampling()
        self._line(f"  model     {info.name}: {info.description}, {info.path}")
        self._line(f"  context   {gauge(*session.context)}")
        self._line(f"  settings  {', '.join(f'{name} {getattr(sampling, name)}' for name in SETTINGS)}")
        self._line(f"  system    {printable(session.system) if session.system else '-'}")
        self._line(f"  turns     {len(session.turns) // 2}")
        if session.last is not None:
            self._line(f"  last      {describe(session.last.profile)}")

    def _save(self, rest: str) -> None:
        if not rest:
            self._line("error: /save needs a FILE", "error")
            return
        try:
            text = json.dumps(self._session.to_dict(), indent=2, ensure_ascii=False) + "\n"
            write_text(expand(rest), text)
        except OSError as error:
            self._line(f"error: cannot write {rest}: {error.strerror}", "error")
        except ConfigError as error:
            self._line(f"error: {error.message}", "error")
        else:
            self._line(f"saved to {rest}")

    def _line(self, text: str, kind: str = "note") -> None:
        self._write(self._style(kind, text) + "\n")


def gauge(used: int, size: int) -> str:
    """How full a context is, as a bar and in numbers."""
    share = used / size
    full = round(share * GAUGE)
    return f"{'█' * full}{'░' * (GAUGE - full)} {used:,} of {size:,} tokens ({share:.0%})"


def describe(profile: Profile) -> str:
    """A profile in one line."""
    first = f", first token after {profile.time_to_first_token_ms:.0f} ms" if profile.time_to_first_token_ms else ""
    rate = 1000 * profile.completion_tokens / profile.decode_ms if profile.decode_ms else 0.0
    return (
        f"{profile.prompt_tokens} prompt tokens ({profile.kv_cache_hit} cached), "
        f"{profile.completion_tokens} generated at {rate:.1f} tokens/s{first}"
    )
