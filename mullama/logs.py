"""What the program logs and how: one line an event, with its time, its level and its subject, as text or as JSON.

    log = logging.getLogger(__name__)
    log.info("loaded in %.2f s", seconds, extra=facts(model=name))

``facts`` go into the text as ``name=value`` and into JSON as fields of their own.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
import traceback
from types import TracebackType
from typing import Any, TextIO

FORMATS = ("text", "json")
_FACTS = "mullama_facts"


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what stderr is in that moment."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def set_up(level: str, form: str = "text") -> None:
    """Log to stderr: our own lines from ``level`` on ("debug", "info", "warning", "error"), other libraries' warnings.

    Called again it replaces what was before.
    """
    handler = _Stderr()
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old.formatter, TextLines | JsonLines):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("mullama").setLevel(level.upper())
    logging.captureWarnings(True)


def facts(**values: Any) -> dict[str, Any]:
    """For ``extra=`` of a log call."""
    return {_FACTS: values}


def said(error: BaseException, *, most: int = 300) -> str:
    """``Type: text (FILE, line N)`` of an error of foreign code, for its author: the innermost line that raised it."""
    try:
        text = str(error)
    except BaseException:  # SystemExit as well: it is foreign code
        text = "something"
    text = text if len(text) <= most else f"{text[: most - 3]}..."
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {text}"  # which says the line itself
    found = traceback.extract_tb(error.__traceback__)
    where = f" ({found[-1].filename}, line {found[-1].lineno})" if found else ""
    return f"{type(error).__name__}: {text}{where}"


def subject_of(record: logging.LogRecord) -> str:
    """Its room and its file, without the folders between: ``web.generations``."""
    room, _, inner = record.name.removeprefix("mullama.").partition(".")
    file = inner.rpartition(".")[2]
    return f"{room}.{file}" if file else room


class TextLines(logging.Formatter):
    """``2026-01-31 12:00:00.123 INFO serving.manager: message name=value``; a traceback follows its line."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created)
        text = one_line(record.getMessage())
        pairs = "".join(f" {name}={_value(value)}" for name, value in getattr(record, _FACTS, {}).items())
        line = f"{when:%Y-%m-%d %H:%M:%S}.{when.microsecond // 1000:03} {record.levelname} {subject_of(record)}: {text}"
        trace = _trace(record)
        return f"{line}{pairs}\n{trace}" if trace else line + pairs


class JsonLines(logging.Formatter):
    """An object a line: ``time`` (ISO 8601 with its offset), ``level``, ``subject``, ``message``, the facts,
    ``traceback``."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created).astimezone()
        line: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "subject": subject_of(record),
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in getattr(record, _FACTS, {}).items() if name not in line}
        if trace := _trace(record):
            line["traceback"] = trace
        return json.dumps(line, default=str)  # ASCII: no character of a client's can break a line


def one_line(text: str) -> str:
    """With all that is not printable spelled out, as Python writes it.

    Paths and names come from clients: they must neither begin another line nor speak to a terminal.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _value(value: Any) -> str:
    text = f"{value:.1f}" if isinstance(value, float) else "-" if value is None else one_line(str(value))
    return json.dumps(text, ensure_ascii=False) if not text or " " in text or '"' in text else text


def _trace(record: logging.LogRecord) -> str:
    info = record.exc_info
    if not info or info[1] is None:
        return ""
    kind, error, where = info
    assert where is None or isinstance(where, TracebackType)
    return "".join(traceback.format_exception(kind, error, where)).rstrip("\n")
