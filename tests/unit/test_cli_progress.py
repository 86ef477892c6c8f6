"""Progress on a terminal and in a log, and the page that documents the commands."""

from __future__ import annotations

import io
from pathlib import Path

import click
import pytest

from mullama.cli import progress
from mullama.cli.main import COMMANDS, cli
from mullama.cli.progress import HashProgress, LoadProgress, PullProgress
from mullama.cli.talk.repl import COMMANDS as CHAT_COMMANDS
from mullama.config import options
from mullama.files import human_size

PAGE = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_gets_a_line_a_step_and_one_every_ten_seconds(clock: Clock) -> None:
    log = io.StringIO()
    with PullProgress("m", log) as show:
        show("downloading", 0, None)
        show("downloading", 5_000_000, 10_000_000)
        clock.now += 11
        show("downloading", 9_000_000, 10_000_000)
        show("unpacking", 1, 10)
    assert log.getvalue() == "m: downloading\nm: downloading 90 %, 0.8 MB/s, 0:01 left\nm: unpacking\n"


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    screen = Terminal()
    with PullProgress("[red]m", screen) as show:
        show("downloading", 0, None)
        show("downloading", 50_000_000, 100_000_000)
        show("unpacking", 1, 2)
    assert "[red]m: unpacking" in screen.getvalue()  # as it is, no markup
    assert screen.getvalue().rstrip("\n").endswith("\x1b[2K")


def test_nothing_is_shown_of_what_is_quick(clock: Clock) -> None:
    for stream in (io.StringIO(), Terminal()):
        with HashProgress("m", stream) as hashing:
            hashing("hashing", 1, 2)
        with LoadProgress("m", stream) as loading:
            assert loading(0.5) is True
        assert stream.getvalue() == ""


def test_a_slow_load_is_shown_and_can_be_cancelled(clock: Clock) -> None:
    log = io.StringIO()
    with LoadProgress("m", log) as loading:
        clock.now += 1
        assert loading(0.5) is True
        loading.cancel()
        assert loading(0.6) is False
    assert log.getvalue() == "m: loading\n"


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (98362432, "98.4 MB"), (5 * 10**12, "5.0 TB")]
)
def test_sizes(size: int, text: str) -> None:
    assert human_size(size) == text


def test_the_page_has_every_command_and_option() -> None:
    """Options of ``ServeConfig`` are on the page of the configuration; those of ``run`` are named here too."""
    context = click.Context(cli)
    for name in COMMANDS:
        assert f"`mullama {name}" in PAGE
        command = cli.get_command(context, name)
        assert command is not None
        for param in command.params:
            if isinstance(param, click.Option) and (
                name not in ("serve", "doctor") or param.name not in {opt.name for opt in options()}
            ):
                assert param.opts[0] in PAGE, f"{name} {param.opts[0]}"
    assert all(f"`{name}" in PAGE for name in CHAT_COMMANDS)


def test_the_page_of_models_has_every_alias() -> None:
    from mullama.models.reference import aliases

    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in aliases())
