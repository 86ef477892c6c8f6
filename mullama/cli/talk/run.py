"""``mullama run``: one prompt, or a chat, without a server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mullama.cli.options import config_from, config_options, echo_json, json_option
from mullama.cli.settings import SETTINGS, parse_setting
from mullama.config import DEFAULT_MODEL
from mullama.errors import ConfigError

if TYPE_CHECKING:
    from mullama.cli.talk.chat import ChatSession
    from mullama.models.store.store import Store

F = TypeVar("F", bound=Callable[..., Any])

#: Of the options of ``serve``, those that mean something for a single conversation.
CONFIG_OPTIONS = (
    *("quant", "allow_private_sources", "ctx_size", "threads", "threads_fixed", "flash_attn", "mmap", "chat_template"),
    *("gpu_layers", "device", "split_mode", "tensor_split", "memory_check"),
)


def sampling_options(function: F) -> F:
    for name, (kind, text) in reversed(SETTINGS.items()):
        flag = f"--{name.replace('_', '-')}"
        function = click.option(flag, name, type=kind, default=None, metavar="N", help=text)(function)
    return function


@click.command(short_help="Ask a model once, or chat with it; no server needed.")
@click.argument("model", required=False)
@click.argument("prompt", required=False)
@click.option("--system", metavar="TEXT", help="system message")
@sampling_options
@config_options(CONFIG_OPTIONS)
@json_option
def command(model: str | None, prompt: str | None, system: str | None, as_json: bool, **params: Any) -> None:
    """Ask MODEL (default: the default model) once and stream the answer, or chat when there is no PROMPT.

    One argument of several words that names no model is a PROMPT for the default model. A prompt may also come from a
    pipe; with both, what comes from the pipe follows PROMPT.
    """
    from mullama.cli.load_progress import find_model, load_engine
    from mullama.cli.talk.chat import ChatSession, valid_text
    from mullama.errors import InvalidRequest
    from mullama.models.store.store import Store

    config = replace(config_from(params), parallel=1)
    store = Store()
    if prompt is None and model is not None and _is_prompt(model, store):
        model, prompt = None, model
    try:
        settings = dict(parse_setting(name, params[name]) for name in SETTINGS if params[name] is not None)
        text = _prompt(prompt)
        for part in (text, system):
            valid_text(part or "")
    except InvalidRequest as error:
        raise click.UsageError(error.message) from None
    if text is None and as_json:
        raise click.UsageError("--json needs a PROMPT")
    found = find_model(model or (config.model[0] if config.model else DEFAULT_MODEL), store, config=config)
    engine = load_engine(found, config)
    try:
        session = ChatSession(engine, system=system, settings=settings)
        if text is None:
            _chat(session, store.root / "history")
        else:
            _ask(session, text, as_json)
    finally:
        engine.close()


def _is_prompt(text: str, store: Store) -> bool:
    """Whether a lone argument is meant as a prompt: it has several words and names no model."""
    from mullama.errors import ReferenceNotFound
    from mullama.models.parse import parse_spec

    if len(text.split()) < 2 or text.lower().endswith(".gguf"):
        return False
    try:
        parse_spec(text, store.lookup)
    except (ReferenceNotFound, ConfigError):  # ConfigError: what is before a "=" is no name
        return True
    return False


def _prompt(prompt: str | None) -> str | None:
    """PROMPT, then what a pipe holds; None: neither, so a chat. Raises UsageError for an empty one, InvalidRequest."""
    from mullama.errors import InvalidRequest

    parts = [] if prompt is None else [prompt]
    is_terminal = sys.stdin.isatty()
    if not is_terminal:
        try:
            parts.append(sys.stdin.buffer.read().decode("utf-8"))
        except UnicodeDecodeError:
            raise InvalidRequest("the prompt from the pipe is not valid UTF-8") from None
    if not parts and is_terminal:
        return None
    text = "\n\n".join(part.strip("\n") for part in parts if part.strip())
    if not text:
        raise click.UsageError("the prompt is empty")
    return text


def _ask(session: ChatSession, text: str, as_json: bool) -> None:
    """One answer on stdout. Ctrl-C stops it and raises KeyboardInterrupt."""
    from mullama.cli.interrupt import on_interrupt
    from mullama.cli.table import printable

    is_terminal = sys.stdout.isatty()
    pieces: list[str] = []
    with on_interrupt(session.cancel):
        for piece in session.ask(text):
            pieces.append(piece)
            if not as_json:
                # Not click.echo: on a pipe it would take escape sequences out of the text.
                sys.stdout.write(printable(piece) if is_terminal else piece)
                sys.stdout.flush()
    if as_json and session.last is not None:
        echo_json(
            {
                "model": session.engine.info.name,
                "text": "".join(pieces),
                "finish_reason": session.last.reason.value,
                "profile": session.last.profile.to_dict(),
            }
        )
    elif not as_json:
        click.echo()
    if session.was_cancelled:
        raise KeyboardInterrupt


def _chat(session: ChatSession, history: Path) -> None:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.formatted_text import ANSI
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    from mullama.cli.talk.repl import COMMANDS, Repl, gauge

    kept: History
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        with history.open("ab"):
            pass
        history.chmod(0o600)  # it holds what the user wrote
        kept = FileHistory(str(history))
    except OSError:  # a read-only home: chat all the same
        kept = InMemoryHistory()
    completer = WordCompleter(sorted(COMMANDS), sentence=True)
    terminal: PromptSession[str] = PromptSession(history=kept, completer=completer, complete_while_typing=False)
    is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def read(prompt: str) -> str:
        shown = ANSI(click.style(prompt, fg="green", bold=True)) if is_coloured else prompt
        return terminal.prompt(shown, bottom_toolbar=lambda: f" {session.engine.info.name}  {gauge(*session.context)}")

    def style(kind: str, text: str) -> str:
        if not is_coloured:
            return text
        return click.style(text, fg="red") if kind == "error" else click.style(text, dim=True)

    Repl(session, read, lambda text: click.echo(text, nl=False), style).run()
