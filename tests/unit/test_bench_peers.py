"""Command lines for the peers are understood by the vendored source, and reports hold what was measured."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from bench import build_peers, calibrate, common, context, disturbance, equality, peers, reuse, scenarios, servers

LLAMA = build_peers.ROOT / "vendor" / "llama.cpp"  # the same commit as the peers are built from
needs_source = pytest.mark.skipif(not (LLAMA / "common").is_dir(), reason="vendor/llama.cpp is not fetched")


def flags_of(command: list[str]) -> set[str]:
    return {word for word in command[1:] if re.fullmatch(r"--?[a-zA-Z][\w-]*", word)}


@needs_source
def test_llama_server_knows_every_flag() -> None:
    known = set(re.findall(r'"(--?[a-zA-Z][\w-]*)"', (LLAMA / "common" / "arg.cpp").read_text(encoding="utf-8")))
    command = servers.llama_server_command(Path("s"), "m.gguf", 1, ctx=2048, parallel=8, threads=2)
    assert flags_of(command) - known == set()
    assert command[command.index("-c") + 1] == str(8 * 2048)


@needs_source
def test_the_build_s_options_and_targets_exist() -> None:
    texts = [path.read_text(encoding="utf-8") for path in [LLAMA / "CMakeLists.txt", LLAMA / "ggml" / "CMakeLists.txt"]]
    known = set(re.findall(r"option\(\s*(\w+)", "\n".join(texts)))
    ours = {name for name in build_peers.DEFINES if name.startswith(("GGML_", "LLAMA_BUILD_U", "LLAMA_U", "LLAMA_O"))}
    assert ours - known == set()
    targets = "".join(path.read_text(encoding="utf-8") for path in LLAMA.glob("tools/*/CMakeLists.txt"))
    for name in build_peers.TARGETS:
        assert re.search(rf"set\(TARGET {name}\)", targets), name


def test_the_mullama_command_uses_known_options() -> None:
    from mullama.config import options

    known = {f"--{opt.name.replace('_', '-')}" for opt in options()}
    command = servers.mullama_command("m", 1, ctx=2048, parallel=8, threads=2)
    assert {flag for flag in flags_of(command) if flag.startswith("--")} - known == set()


@pytest.mark.parametrize(
    ("line", "step"),
    [("[12/225] Building CXX", (12, 225)), ("[ 37%] Building", (37, 100)), ("-- Configuring done", None)],
)
def test_progress_is_read_from_ninja_and_make(line: str, step: tuple[int, int] | None) -> None:
    assert build_peers.step_of(line) == step


def test_missing_tools_are_named(tmp_path: Path) -> None:
    with pytest.raises(build_peers.BuildFailed, match=r"llama-bench.*llama-server.*--no-build"):
        build_peers.Tools.at(tmp_path)


class FakePool(servers.Pool):
    """No processes: hands out servers that only have a name, and remembers the order."""

    def __init__(self) -> None:
        super().__init__([servers.Server(kind, kind, [], 0) for kind in (context.MULLAMA, context.PEER)])
        self.order: list[str] = []

    def use(self, name: str) -> servers.Server:
        self.order.append(name)
        return self.servers[name]

    def idle_cpu(self) -> float:
        return 0.0


def make_context() -> context.Context:
    tools = build_peers.Tools(Path("a"), Path("b"), Path("c"), Path("d"))
    return context.Context(tools=tools, model=Path("m.gguf"), rounds=3)


def test_interleaved_rounds_alternate_discard_and_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "SETTLE_S", 0.0)
    quiet = {"hash_1": 100.0, "hash_2": 200.0}
    # round 2 (its second calibration) met a busy neighbour
    spells = iter([quiet, quiet, quiet, quiet | {"hash_2": 120.0}, *[quiet] * 4])
    monkeypatch.setattr(calibrate, "calibrate", lambda *_: next(spells))
    pool = FakePool()
    rates = {context.MULLAMA: 110.0, context.PEER: 100.0}

    def prepare(i: int) -> scenarios.Work:
        wild = 10.0 if i == 1 else 1.0  # what was measured in the bad round must not count
        return lambda server: {"tok_s": rates[server.name] * wild + i}

    result = context.interleaved(make_context(), "test", pool, prepare)
    assert (result["kept"], result["discarded"]) == (3, 1)
    assert pool.order[:4] == [context.MULLAMA, context.PEER, context.PEER, context.MULLAMA]
    assert result[context.MULLAMA]["tok_s"]["median"] == 112.0
    assert result["ratio"]["tok_s"]["median"] == pytest.approx(112 / 102)
    assert [row["kept"] for row in result["rounds"]] == [True, False, True, True]
    text = context.comparison_table("test", result)
    assert "1.098" in text
    assert "3 rounds kept, 1 discarded" in text


def test_interleaved_gives_up_after_twice_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "SETTLE_S", 0.0)
    rising = iter(range(100, 10_000, 100))  # every calibration makes all earlier ones look bad
    monkeypatch.setattr(calibrate, "calibrate", lambda *_: {"hash_1": float(2 ** (next(rising) / 100))})
    result = context.interleaved(make_context(), "test", FakePool(), lambda _: lambda _server: {"tok_s": 1.0})
    assert len(result["rounds"]) == 6
    assert result["kept"] == 0
    assert "6 discarded" in context.comparison_table("test", result)


def test_a_failing_scenario_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> peers.Result:
        raise RuntimeError("3 requests failed")

    monkeypatch.setitem(peers.SCENARIOS, "startup", (False, fails, str))
    monkeypatch.setitem(peers.SCENARIOS, "neighbours", (False, lambda *_: {"ok": 1}, lambda r: f"table {r}"))
    results: peers.Result = {}
    assert peers.run(make_context(), ["startup", "neighbours"], results) is False
    assert results == {"startup": {"failed": "3 requests failed"}, "neighbours": {"ok": 1}}
    shown = capsys.readouterr().out
    assert "startup FAILED: 3 requests failed" in shown
    assert "table {'ok': 1}" in shown


def test_reports_show_what_was_measured() -> None:
    one = common.summarize([50.0, 52.0, 51.0])
    never = common.summarize([])
    labels = (context.MULLAMA, f"{context.PEER} -t 2", f"{context.PEER} -t 1")
    measured: dict[str, Any] = {label: {"alone": one, "full speed after engine s": never} for label in labels}
    measured |= {"rounds": {label: [{}, {}, {}] for label in labels}}
    measured |= {"ratio to the best fixed thread count": {"alone": 0.97}}
    text = disturbance.neighbours_report(measured)
    assert "| alone" in text
    assert "(3 of 3 never)" in text
    assert "alone 0.97" in text

    counts = dict.fromkeys(("exact", "tie", "different", "strict", "strict_not_exact", "token_counts_differ"), 7)
    text = equality.report({"prompts": 56, "holds": False, "mullama 8": counts | {"cases": []}})
    assert "mullama 8" in text
    assert "holds: False" in text

    text = peers.offline_report({context.MULLAMA: {"decode 8": one, "hole cost": one}, "llama.cpp": {"decode 8": one}})
    assert re.search(r"decode 8 +\| +51 \| +51 \| +1 \|", text)
    assert "| hole cost" in text

    text = peers.startup_report({context.MULLAMA: one})
    assert re.search(r"mullama +\| +51 \| +50 \| +52", text)


def test_arguments_have_the_defaults_the_readme_names() -> None:
    args = peers.parse_args(["--no-build", "--scenario", "one", "--mullama-arg=--threads-fixed"])
    assert (args.rounds, args.ctx, args.parallel, args.threads) == (7, 2048, 8, 2)
    assert (args.prompt_tokens, args.max_tokens, args.scenario) == (140, 64, ["one"])
    assert args.mullama_arg == ["--threads-fixed"]
    with pytest.raises(SystemExit):
        peers.parse_args(["--scenario", "nonsense"])


def test_the_readme_describes_every_scenario() -> None:
    readme = (common.ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    assert [name for name in peers.SCENARIOS if f"`{name}`" not in readme] == []


def test_a_build_of_another_source_starts_over(tmp_path: Path) -> None:
    cache = tmp_path / "CMakeCache.txt"
    build_peers._forget_another_source(cache)  # nothing built yet
    cache.write_text(f"A:BOOL=ON\nCMAKE_HOME_DIRECTORY:INTERNAL={build_peers.SOURCE.as_posix()}\n", encoding="utf-8")
    build_peers._forget_another_source(cache)
    assert cache.is_file()
    cache.write_text("CMAKE_HOME_DIRECTORY:INTERNAL=/somewhere/else\n", encoding="utf-8")
    build_peers._forget_another_source(cache)
    assert not cache.exists()


@pytest.mark.parametrize(("extra", "size"), [((), "8192"), (("-cram", "0"), "0")])
def test_the_peer_s_prompt_cache_can_be_turned_off(tmp_path: Path, extra: tuple[str, ...], size: str) -> None:
    """The last of several wins."""
    tools = build_peers.Tools(*(tmp_path for _ in dataclasses.fields(build_peers.Tools)))
    found = context.Context(tools=tools, model=tmp_path / "m.gguf", peer_args=extra)
    with reuse.caching_pool(found) as pool:
        command = pool.servers[context.PEER].command
    assert [b for a, b in itertools.pairwise(command) if a == "-cram"][-1] == size


def test_what_llama_cpp_does_not_run_without_is_told_by_the_processor(tmp_path: Path) -> None:
    (tmp_path / "amx").write_text("flags\t\t: fpu avx512f amx_bf16 amx_tile\n", encoding="utf-8")
    (tmp_path / "none").write_text("flags\t\t: fpu avx512f\n", encoding="utf-8")
    (patch,) = build_peers.needed_patches(tmp_path / "amx")
    assert (build_peers.ROOT / "vendor" / "patches" / patch).is_file()
    assert build_peers.needed_patches(tmp_path / "none") == []
    assert build_peers.needed_patches(tmp_path / "missing") == []
