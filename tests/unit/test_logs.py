"""Lines of the log: one an event, whatever clients call things; tracebacks of users' code; unknown variables."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullama import logs
from mullama.config import ENV_PREFIX, OTHER_VARIABLES, options, unknown_variables
from mullama.errors import PluginError
from mullama.kv.eviction.guarded import GuardedPolicy
from mullama.plugins.user_code import load_object

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (DEBUG|INFO|WARNING|ERROR) (\S+): (.*)")


def test_a_line_has_a_time_a_level_and_a_subject(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info")
    log = logging.getLogger("mullama.serving.manager")
    log.info("loaded in %.2f s", 1.5, extra=logs.facts(model="a b", slots=4, ms=12.345, user=None, empty=""))
    log.debug("not this")
    line = capsys.readouterr().err
    match = LINE.fullmatch(line.rstrip("\n"))
    assert match
    assert match[2] == "serving.manager"
    assert match[3] == 'loaded in 1.50 s model="a b" slots=4 ms=12.3 user=- empty=""'


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("debug", "json")
    log = logging.getLogger("mullama.web")
    try:
        raise ValueError("on purpose\nin two lines")
    except ValueError:
        log.exception("it failed", extra=logs.facts(status=200, ms=1.25, message="not over the real one"))
    (line,) = capsys.readouterr().err.splitlines()
    found = json.loads(line)
    assert (found["level"], found["subject"], found["message"]) == ("error", "web", "it failed")
    assert (found["status"], found["ms"]) == (200, 1.25)
    assert "test_logs.py" in found["traceback"] and "ValueError: on purpose" in found["traceback"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", found["time"])


@pytest.mark.parametrize("form", logs.FORMATS)
@given(text=st.text(max_size=30), value=st.text(max_size=30))
def test_no_name_of_a_client_makes_another_line(form: str, text: str, value: str) -> None:
    formatter = logs.JsonLines() if form == "json" else logs.TextLines()
    record = logging.LogRecord("mullama.x", logging.INFO, "f", 1, "%s", (text,), None)
    vars(record).update(logs.facts(path=value))
    line = formatter.format(record)
    assert len(line.splitlines()) == 1 and line.isprintable()
    line.encode()


def test_other_libraries_are_heard_when_something_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("debug")
    for name in ("filelock", "httpx", "asyncio", "some.library"):
        logging.getLogger(name).debug("acquired")
        logging.getLogger(name).info("acquired")
    assert capsys.readouterr().err == ""
    logging.getLogger("some.library").warning("look")
    (line,) = capsys.readouterr().err.splitlines()
    assert LINE.fullmatch(line) and "WARNING some.library: look" in line


def test_setting_up_again_replaces_what_was(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info")
    logs.set_up("warning", "json")
    logging.getLogger("mullama.x").warning("once")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "once"


# -- users' code


def fail() -> None:
    raise ZeroDivisionError("on purpose")


def test_an_error_says_where() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        fail()
    text = logs.said(caught.value)
    assert re.fullmatch(r"ZeroDivisionError: on purpose \(.*test_logs\.py, line \d+\)", text)
    assert logs.said(ValueError("x" * 500), most=20) == f"ValueError: {'x' * 17}..."

    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    assert logs.said(Mute()) == "Mute: something"


def test_a_policy_file_that_fails_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "policy.py"
    file.write_text("x = 1\n\nx / 0\n")
    with pytest.raises(PluginError, match=r"ZeroDivisionError: division by zero \(.*policy\.py, line 3\)"):
        load_object(f"{file}:P", "scheduler")


def test_an_eviction_policy_that_fails_leaves_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        name = "broken"

        def score(self, entry: object, now_ns: int) -> float:
            raise KeyError("gone")

        def params(self) -> dict[str, int]:
            return {}

    policy = GuardedPolicy(Broken(), "mine.py:Broken")  # type: ignore[arg-type]
    with pytest.raises(Exception):  # noqa: B017 - lru needs a real entry
        policy.score(None, 0)  # type: ignore[arg-type]
    assert policy.fallback is not None
    assert re.search(r"KeyError: 'gone' \(.*test_logs\.py, line \d+\)", policy.fallback["reason"])
    assert 'raise KeyError("gone")' in caplog.text


# -- the environment


def test_unknown_variables_are_named() -> None:
    env = {"MULLAMA_CTX_SISE": "1", "MULLAMA_ZZZZ": "", "MULLAMA_PORT": "1", "MULLAMA_HOME": "/", "OTHER": "1"}
    assert unknown_variables(env) == [
        "the variable MULLAMA_CTX_SISE is not known; is MULLAMA_CTX_SIZE meant?",
        "the variable MULLAMA_ZZZZ is not known",
    ]


def test_every_variable_that_the_code_reads_is_known() -> None:
    known = {f"{ENV_PREFIX}{opt.name.upper()}" for opt in options()} | OTHER_VARIABLES
    package = Path(logs.__file__).parent
    read = {
        name
        for file in package.rglob("*.py")
        for name in re.findall(r'"(MULLAMA_[A-Z_]*[A-Z])"', file.read_text(encoding="utf-8"))
    }
    assert {"MULLAMA_URL", "MULLAMA_ADMIN_KEY"} <= read
    constants = {name for name in read if name.startswith(("MULLAMA_SLOT", "MULLAMA_ABI"))}
    assert read - constants <= known
