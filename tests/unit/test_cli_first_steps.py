"""What somebody types who meets the program for the first time: versions, sizes, help, a question, a file to keep."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from models_support import make_gguf
from test_cli_commands import engines, home, model, run  # noqa: F401 - fixtures

from mullama.cli.main import COMMANDS, cli
from mullama.cli.options import Grouped
from mullama.config import DEFAULT_MODEL, GROUPS, ServeConfig, load_config, options
from mullama.errors import ConfigError
from mullama.files import count_of, counted, parse_size
from mullama.machine.neighbours import Neighbours
from mullama.models.store.store import Store
from mullama.scheduling.base import wanting

Run = Callable[..., tuple[int, str, str]]

# ruff: noqa: F811 - fixtures


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "decimal", "binary"),
    [
        ("4096", 4096, 4096), ("4k", 4000, 4096), ("8GB", 8 * 10**9, 8 << 30), ("8 GiB", 8 << 30, 8 << 30),
        ("512MiB", 512 << 20, 512 << 20), ("1.5G", 1_500_000_000, 3 << 29), ("2tb", 2 * 10**12, 2 << 40), ("7B", 7, 7),
        ("0", 0, 0),
    ],
)  # fmt: skip
def test_sizes(text: str, decimal: int, binary: int) -> None:
    assert parse_size(text) == decimal
    assert parse_size(text, binary=True) == binary


@pytest.mark.parametrize("text", ["", "GB", "8 gigabytes", "-4k", "4kk", "1.0001", "0.0001k", "١٢", "1e3", "4,5k"])
def test_what_is_no_size(text: str) -> None:
    if text == "١٢":  # digits all the same
        assert parse_size(text) == 12
        return
    with pytest.raises(ValueError, match=re.escape(text) or "^$"):
        parse_size(text)


@pytest.mark.parametrize(
    ("n", "text"), [(134_515_008, "135M"), (1_711_376_384, "1.7B"), (70_553_706_496, "71B"), (2_000_000_000, "2B"),
                    (268_098_176, "268M"), (44_000, "44K"), (7_500, "7.5K"), (12, "12")],
)  # fmt: skip
def test_counts(n: int, text: str) -> None:
    assert count_of(n) == text


def test_options_take_sizes() -> None:
    env = {"MULLAMA_KV_DISK_BYTES": "3GiB", "MULLAMA_MEMORY_BUDGET": "8GB", "MULLAMA_MAX_BODY_BYTES": "64MB"}
    config = load_config({"ctx_size": "4k", "kv_host_bytes": "1.5GB", "kv_tokens": "128K", "batch_size": "1k"}, env=env)
    assert (config.ctx_size, config.kv_tokens, config.batch_size) == (4096, 131072, 1024)
    assert (config.kv_host_bytes, config.kv_disk_bytes, config.max_body_bytes) == (1_500_000_000, 3 << 30, 64_000_000)
    assert config.memory_budget == "8000000000"
    assert load_config({"kv_host_bytes": "-1", "memory_budget": "auto"}, env={}).memory_budget == "auto"
    assert ServeConfig(ctx_size="2k").ctx_size == 2048  # type: ignore[arg-type]
    for flags, reason in (
        ({"ctx_size": "4q"}, "--ctx-size: '4q' is not a number of tokens, as 4096 or 4k"),
        ({"kv_disk_bytes": "many"}, "--kv-disk-bytes: 'many' is not a number of bytes, as 8GB or 512MiB"),
        ({"memory_budget": "half"}, "--memory-budget: 'half' is not a number of bytes"),
        ({"batch_size": "1M"}, "--batch-size: 1048576 is out of range"),
        ({"parallel": "4k"}, "--parallel: '4k' is not a whole number"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(flags, env={})
        assert caught.value.message.startswith(reason)


def test_every_option_of_bytes_takes_sizes() -> None:
    for opt in options():
        if opt.name.endswith("_bytes"):
            assert opt.metadata["unit"] == "bytes", opt.name


# -- help and versions ------------------------------------------------------------------------------------------------


def test_version(run: Run) -> None:
    status, out, err = run("--version")
    assert (status, err) == (0, "")
    assert re.fullmatch(r"mullama \d+\.\d+\.\d+\S* \(llama\.cpp \S+\)\n", out)


def test_help_of_serve_is_in_groups(run: Run) -> None:
    status, out, _ = run("serve", "--help")
    assert status == 0
    titles = [line[:-1] for line in out.splitlines() if re.fullmatch(r"[A-Z][^.]*:", line)]
    assert titles == [*GROUPS.values(), "Other options"]
    assert list(GROUPS) == [opt.name for opt in options() if opt.name in GROUPS], "in the order of the options"
    keys, computing = out.index("Keys and clients:"), out.index("Computing:")
    assert computing < out.index("--flash-attn") < keys < out.index("--admin-key") < out.index("Logs, events")
    assert "[default: 8080; env: MULLAMA_PORT]" in " ".join(out.split())
    for opt in options():
        assert f"--{opt.name.replace('_', '-')} " in out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_plain_text(name: str, run: Run) -> None:
    status, out, _ = run(name, "--help")
    assert status == 0
    assert "``" not in out and "\x1b" not in out
    assert isinstance(cli.get_command(click.Context(cli), name), Grouped) == (name == "serve")


# -- a question and a file --------------------------------------------------------------------------------------------


def test_a_question_goes_to_the_default_model(run: Run, engines: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def found(text: str, *args: Any, **more: Any) -> Any:
        asked.append(text)
        raise ConfigError("stop here")

    monkeypatch.setattr("mullama.cli.load_progress.find_model", found)
    for question in ("why is the sky blue?", "sum = 1 + 1, right?", "a/b or c"):
        assert "stop here" in run("run", question)[2]
    assert asked == [DEFAULT_MODEL] * 3
    for name in ("smollm2:135m", "nonsense", "Some Model.gguf", "hf:owner/repo"):
        run("run", name)
    assert asked[3:] == ["smollm2:135m", "nonsense", "Some Model.gguf", "hf:owner/repo"]


def test_a_model_whose_name_has_spaces_is_a_model(run: Run, model: str, engines: list[Any]) -> None:
    status, out, err = run("run", model, "hi there")
    assert (status, out) == (0, "Hello, wörld\n"), err
    assert engines[0].info.path.endswith("Some Model.gguf")


def test_a_file_is_kept_under_a_name(run: Run, tmp_path: Path) -> None:
    (tmp_path / "My-Q4_0.gguf").write_bytes(make_gguf())
    status, out, err = run("pull", "Mine=./My-Q4_0.gguf")
    assert status == 0, err
    assert out.startswith("mine is ready: ")
    (tmp_path / "My-Q4_0.gguf").unlink()
    entry = Store().find("mine")
    assert entry is not None and entry.quant == "Q4_0"
    shown = json.loads(run("show", "mine", "--json")[1])
    assert (shown["name"], shown["quant"]) == ("mine", "Q4_0")
    status, _, err = run("pull", "smollm2:135m=./My-Q4_0.gguf")
    assert status != 0
    assert not list(Store().tmp.glob("work-*")), "nothing is left behind"


def test_what_cannot_be_kept(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUFnonsense")
    assert run("pull", "mine=./x.gguf")[0] == 1
    assert Store().find("mine") is None
    (tmp_path / "y-00001-of-00002.gguf").write_bytes(make_gguf())
    assert "one part of several" in run("pull", "mine=./y-00001-of-00002.gguf")[2]
    status, _, err = run("pull", "./x.gguf")
    assert status == 1 and "mullama pull NAME=" in err


# -- neighbours -------------------------------------------------------------------------------------------------------


class Machine:
    """Two cores of ours and one of others, by hand."""

    def __init__(self, path: Path) -> None:
        self.path, self.time, self.own = path, 0.0, 0.0
        self.ticks = {0: 0, 1: 0, 7: 0}
        self.write()

    def write(self) -> None:
        rows = [f"cpu{core} {n} 999 0 0 0 0 0 0 0 0" for core, n in self.ticks.items()]
        self.path.write_text("\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *rows, "intr 5", ""]))


def test_neighbours_are_counted_on_our_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mullama.machine.neighbours._TICKS", 100)
    machine = Machine(tmp_path / "stat")
    seen = Neighbours(machine.path, clock=lambda: machine.time, own=lambda: machine.own, cores=(0, 1))
    machine.time, machine.own = 2.0, 1.5
    machine.ticks = {0: 150, 1: 100, 7: 200}  # 2.5 s of work, 1.5 of them ours
    machine.write()
    assert seen.busy() == pytest.approx(0.5)
    machine.time = 4.0
    assert seen.busy() == 0.0, "since the last call"
    machine.path.write_text("nonsense")
    machine.time = 5.0
    assert seen.busy() == 0.0
    assert Neighbours(tmp_path / "none").busy() == 0.0


# -- words ------------------------------------------------------------------------------------------------------------


def test_one_is_not_many() -> None:
    assert [counted(n, "thread") for n in (0, 1, 2, 1024)] == ["0 threads", "1 thread", "2 threads", "1,024 threads"]
    assert [wanting(n) for n in (1, 2)] == ["1 sequence wants to compute", "2 sequences want to compute"]


def test_policies_are_described_in_plain_text(run: Run) -> None:
    status, out, _ = run("schedulers")
    assert status == 0 and "``" not in out and "lowest priority" in out
    assert "``" not in run("schedulers", "deadline")[1]
    assert "``" not in run("schedulers", "--json")[1]
