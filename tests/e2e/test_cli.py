"""The commands as a user meets them: one-shot, from a pipe, in a terminal; list, show, version."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from homes import home

from .support import PROFILE_FIELDS, clean_env, mullama, run_mullama

GREEDY = ("--temperature", "0", "--threads", "1", "--ctx-size", "1024")


def run(*args: str, stdin: bytes | None = None, **env: str) -> str:
    """A command that succeeds with nothing on stderr but progress; its stdout."""
    done = run_mullama(*args, stdin=stdin, timeout=120, **env)
    stderr = done.stderr.decode()
    assert done.returncode == 0, stderr
    assert all(line.endswith(": loading") for line in stderr.splitlines()), stderr
    stdout: str = done.stdout.decode()
    return stdout


def fails(*args: str, stdin: bytes | None = None, status: int = 1, **env: str) -> str:
    """A command that fails with one line; that line."""
    done = run_mullama(*args, stdin=stdin, timeout=60, **env)
    stderr = done.stderr.decode()
    assert done.returncode == status, stderr
    assert done.stdout == b"" and "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if not line.endswith(": loading")]
    return line


# -- run --------------------------------------------------------------------------------------------------------------


def test_one_shot(smollm2: Path) -> None:
    args = ("run", str(smollm2), "Why is the sky blue?", *GREEDY)
    short, longer = run(*args, "--max-tokens", "8"), run(*args, "--max-tokens", "12")
    assert short.endswith("\n") and "sky" in short
    assert longer.startswith(short.rstrip("\n"))


def test_from_a_pipe(smollm2: Path) -> None:
    ask = ("run", str(smollm2), *GREEDY, "--max-tokens", "8")
    piped = run(*ask, stdin=b"Why is the sky blue?\n")
    assert piped == run("run", str(smollm2), "Why is the sky blue?", *GREEDY, "--max-tokens", "8")
    both = run("run", str(smollm2), "Why is this blue?", *GREEDY, "--max-tokens", "8", stdin=b"The sky.\n")
    assert both.strip()


def test_json(smollm2: Path) -> None:
    answer = json.loads(run("run", str(smollm2), "Name a fruit.", *GREEDY, "--max-tokens", "5", "--json"))
    assert (answer["finish_reason"], answer["profile"]["completion_tokens"]) == ("length", 5)
    assert answer["profile"].keys() >= PROFILE_FIELDS
    assert answer["model"] == re.sub(r"[^a-z0-9._:-]+", "-", smollm2.stem.lower())


def test_a_system_message_and_a_seed(smollm2: Path) -> None:
    args = ("run", str(smollm2), "Hello", "--max-tokens", "12", "--threads", "1", "--seed", "4", "--temperature", "1")
    assert run(*args) == run(*args)
    assert run(*args, "--system", "You only speak French.") != run(*args)


def test_a_pipe_that_closes_early_is_no_traceback(smollm2: Path) -> None:
    process = subprocess.Popen(
        mullama("run", str(smollm2), "Tell me a story.", *GREEDY, "--max-tokens", "400"),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_env(),
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.read(1)
        process.stdout.close()
        stderr = process.stderr.read().decode()
        process.wait(60)
    finally:
        process.kill()
        process.stderr.close()
    assert "Traceback" not in stderr and "Exception ignored" not in stderr, stderr


def test_wrong_uses_of_run(smollm2: Path, tmp_path: Path) -> None:
    assert "nothing.gguf" in fails("run", str(tmp_path / "nothing.gguf"), "x")
    assert "UTF-8" in run_mullama("run", str(smollm2), stdin=b"\xff\xfe").stderr.decode()
    for args in (("--temperature", "9"), ("--max-tokens", "0"), ("--top-p", "x")):
        done = run_mullama("run", str(smollm2), "x", *args)
        assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert "256" in fails("run", str(smollm2), "word " * 2000, "--ctx-size", "256", "--threads", "1")


# -- a terminal -------------------------------------------------------------------------------------------------------


class Terminal:
    """A program under a pseudo-terminal: what a user types, and what appears."""

    def __init__(self, args: list[str], **env: str) -> None:
        import fcntl
        import termios

        self._master, slave = os.openpty()

        def take_terminal() -> None:  # so that Ctrl-C becomes a signal
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            args,
            stdin=slave, stdout=slave, stderr=slave,
            env=clean_env(TERM="xterm", PROMPT_TOOLKIT_NO_CPR="1", **env),
            start_new_session=True,
            preexec_fn=take_terminal,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait(30)
        os.close(self._master)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def say(self, line: str) -> str:
        """Type a line; what appears between it and the next prompt."""
        self.type(line + "\r")
        self.expect(re.escape(line) + r"\s*\n")
        return self.expect(">>>")

    def expect(self, pattern: str, seconds: float = 60.0) -> str:
        """Wait until the output holds ``pattern``; returns what came before it, and takes both off."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            left = end - time.monotonic()
            assert left > 0, f"{pattern!r} did not appear in {self.seen!r}"
            assert self._more(left), f"it ended before {pattern!r} appeared: {self.seen!r}"
        before, self.seen = self.seen[: found.start()], self.seen[found.end() :]
        return before

    def _more(self, seconds: float) -> bool:
        """Read what is there; False at the end."""
        if not select.select([self._master], [], [], min(seconds, 1.0))[0]:
            return True
        try:
            data = os.read(self._master, 65536)
        except OSError:  # Linux's way to say that the other side was closed
            return False
        # Colours and cursor movements are not what the tests are about.
        self.seen += re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])", "", data.decode(errors="replace"))
        return bool(data)

    def wait(self, seconds: float = 60.0) -> int:
        """The exit code; reads on meanwhile, so that the program is not held up."""
        end = time.monotonic() + seconds
        while self._more(0.1) and time.monotonic() < end:
            pass
        return self.process.wait(max(1.0, end - time.monotonic()))


@pytest.fixture
def chat(smollm2: Path, tmp_path: Path) -> Iterator[Terminal]:
    """A chat that has begun; its history is in a folder of its own."""
    if sys.platform == "win32":
        pytest.skip("no pseudo-terminals")
    args = ("run", str(smollm2), "--temperature", "0", "--threads", "1", "--ctx-size", "4096")
    with Terminal(mullama(*args), MULLAMA_HOME=home(tmp_path / "home")) as terminal:
        terminal.expect(r"tokens of context\)")
        terminal.expect(">>>")
        yield terminal


def test_a_chat(chat: Terminal, tmp_path: Path) -> None:
    assert "max_tokens is 12" in chat.say("/set max_tokens 12")
    assert "The sky" in chat.say("Why is the sky blue?")
    assert chat.say("And the sea?").strip()
    shown = chat.say("/show")
    assert "turns     2" in shown
    (cached,) = re.findall(r"\((\d+) cached\)", shown)
    assert int(cached) > 30, "the second turn went on from the first"
    assert "saved to" in chat.say(f"/save {tmp_path / 'chat.json'}")
    saved: dict[str, Any] = json.loads((tmp_path / "chat.json").read_text())
    assert [message["role"] for message in saved["messages"]] == ["user", "assistant"] * 2
    assert "there is no command" in chat.say("/nonsense")
    chat.type("/exit\r")
    assert chat.wait() == 0
    assert "Traceback" not in chat.seen
    assert "Why is the sky blue?" in (tmp_path / "home" / "history").read_text()


def test_ctrl_c_stops_a_reply_and_not_the_program(chat: Terminal) -> None:
    chat.type("Write a very long story about the sea and everybody in it.\r")
    chat.expect(r"in it\.\s*\n\S+ \S+ ")  # some words of the reply
    chat.type("\x03")
    chat.expect(r"\(stopped\)")
    chat.expect(">>>")
    chat.type("\x03")  # at the prompt it does not leave either
    chat.expect("Ctrl-D or /exit")
    chat.expect(">>>")
    chat.say("/set max_tokens 3")
    assert chat.say("Hello").strip(), "it goes on as before"
    chat.type("\x04")
    assert chat.wait() == 0
    assert "Traceback" not in chat.seen


def test_ctrl_c_while_one_shot_runs(smollm2: Path, tmp_path: Path) -> None:
    args = mullama("run", str(smollm2), "Tell me a very long story about the sea.", *GREEDY)
    with Terminal(args, MULLAMA_HOME=home(tmp_path)) as terminal:
        terminal.expect(r"\S+ \S+ \S+ ")
        terminal.type("\x03")
        assert terminal.wait() == 130
        assert "Traceback" not in terminal.seen


# -- the other commands -----------------------------------------------------------------------------------------------


def test_version() -> None:
    import mullama as package

    facts = json.loads(run("version", "--json"))
    assert facts["mullama"] == package.__version__
    assert re.fullmatch(r"b\d+|[0-9a-f]{9,40}", facts["llama.cpp"])
    assert facts["llama.cpp"] in run("version")


def test_the_console_script() -> None:
    script = Path(sys.executable).with_name("mullama" + (".exe" if sys.platform == "win32" else ""))
    done = subprocess.run([script, "version"], capture_output=True, env=clean_env(), timeout=60, check=True)
    assert done.stdout.decode() == run("version")


def test_list(tmp_path: Path) -> None:
    assert json.loads(run("list", "--json", MULLAMA_HOME=str(tmp_path))) == []
    done = run_mullama("list", MULLAMA_HOME=str(tmp_path))
    assert done.returncode == 0 and b"mullama pull" in done.stderr


def test_list_shows_what_is_in_the_store(tmp_path: Path, smollm2: Path) -> None:
    from mullama.models.reference import aliases

    # A store with the model in it, made of a link to the file.
    alias = aliases()["smollm2:135m"]
    blobs, refs = tmp_path / "blobs", tmp_path / "refs"
    blobs.mkdir()
    refs.mkdir()
    if smollm2.stat().st_size != alias.size:
        pytest.skip("the test model is not the one of the alias")
    (blobs / f"sha256-{alias.sha256}.gguf").symlink_to(smollm2.resolve())
    entry = {
        "key": "smollm2:135m", "source": alias.source, "locations": list(alias.locations), "filename": "SmolLM2.gguf",
        "sha256": alias.sha256, "size": alias.size, "license": alias.license, "pulled_at": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    (refs / "smollm2%3A135m.json").write_text(json.dumps(entry))
    folder = home(tmp_path)
    (listed,) = json.loads(run("list", "--json", MULLAMA_HOME=folder))
    assert (listed["name"], listed["sha256"], listed["size"]) == ("smollm2:135m", alias.sha256, alias.size)
    assert "smollm2:135m" in run("list", MULLAMA_HOME=folder)
    shown = json.loads(run("show", "smollm2:135m", "--json", MULLAMA_HOME=folder))
    assert (shown["name"], shown["sha256"]) == ("smollm2:135m", alias.sha256)
    assert run("run", "smollm2:135m", "Hi", *GREEDY, "--max-tokens", "2", MULLAMA_HOME=folder).strip()
    run("rm", "smollm2:135m", MULLAMA_HOME=folder)
    assert json.loads(run("list", "--json", MULLAMA_HOME=folder)) == []
    assert smollm2.exists()


def test_show(smollm2: Path) -> None:
    facts = json.loads(run("show", str(smollm2), "--json"))
    assert (facts["architecture"], facts["size"]) == ("llama", smollm2.stat().st_size)
    assert facts["vocabulary"] == 49152
    assert facts["metadata"]["llama.block_count"] == facts["layers"] == 30
    assert "<|im_start|>" in facts["chat_template"]
    assert run("show", str(smollm2), "--template").strip() == facts["chat_template"].strip()
    assert "llama.block_count = 30" in run("show", str(smollm2))


def test_show_a_damaged_file(smollm2: Path, tmp_path: Path) -> None:
    file = tmp_path / "damaged.gguf"
    with smollm2.open("rb") as source:
        head = source.read(100_000)
    for damaged in (b"", head[:50], head, b"NOPE" + head[4:], head[:16] + b"\xff" * 8 + head[24:]):
        file.write_bytes(damaged)
        assert "damaged.gguf" in fails("show", str(file))
        assert "damaged.gguf" in fails("show", str(file), "--json")
    assert "nothing" in fails("show", "nothing")


def test_help_names_every_command() -> None:
    text = run("--help")
    for command in ("serve", "run", "pull", "list", "show", "rm", "version"):
        assert re.search(rf"^\s+{command}\s", text, re.MULTILINE)
        assert run(command, "--help").startswith("Usage: mullama " + command)
