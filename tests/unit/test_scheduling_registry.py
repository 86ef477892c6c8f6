"""Policies by name, by entry point and by file, and ``mullama schedulers``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from policy_support import moment, seq

from mullama.cli.main import main
from mullama.errors import InvalidRequest, PluginError
from mullama.scheduling import SCHEDULERS, Fcfs, Policy, create, describe, describe_all, is_builtin, names_code
from mullama.scheduling.registry import BUILTINS

MINE = '''
"""Mine."""
from __future__ import annotations
from dataclasses import dataclass
from mullama.scheduling import Plan

@dataclass
class Record:
    seq: object

class Mine:
    """Lets one run at a time.

    More of it.
    """

    SOURCE = "my head"

    def __init__(self, size: int = 3, share=0.5, label: str | None = None):
        self.size, self.share, self.label = size, share, label
        self.seqs = {}

    def add(self, seq):
        self.seqs[seq.id] = Record(seq)

    def remove(self, seq_id):
        self.seqs.pop(seq_id, None)

    def plan(self, state):
        for seq_id, record in self.seqs.items():
            return Plan({seq_id: min(record.seq.prefill_left, self.size) or 1})
        return Plan()
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


# -- built-ins ---------------------------------------------------------------------------------------------------


def test_every_builtin_is_made_by_its_name() -> None:
    assert list(BUILTINS) == ["fcfs", "round_robin", "priority", "preemptive", "fair", "srpt", "deadline"]
    for name in BUILTINS:
        policy = create(name)
        assert policy.name == name
        assert isinstance(policy, Policy)
        assert dict(policy.params()) == {param.name: param.default for param in policy.PARAMS}
        assert is_builtin(name)


def test_every_builtin_says_what_it_does_and_where_it_comes_from() -> None:
    for policy in describe_all():
        assert policy["builtin"] == (policy["name"] in BUILTINS)
        if policy["builtin"]:
            assert policy["summary"].endswith(".") and policy["source"]
            assert all(param["help"] and param["range"] for param in policy["params"])
            names = [param["name"] for param in policy["params"]]
            assert names[:3] == ["prefill_budget", "max_running", "chunk"]
            assert len(names) == len(set(names))


def test_parameters_are_checked() -> None:
    assert create("fcfs", {"prefill_budget": "100"}).params()["prefill_budget"] == 100
    with pytest.raises(InvalidRequest, match=r"priority has no parameter 'quantum_ms'; its parameters are .*ageing_s"):
        create("priority", {"quantum_ms": 5})
    with pytest.raises(InvalidRequest, match="ageing_s must be a number from 0 to 1,000,000, not -1"):
        create("priority", {"ageing_s": -1})


@pytest.mark.parametrize("spec", ["nonsense", "", "FCFS", "mullama.scheduling.fcfs"])
def test_an_unknown_name_gets_the_valid_ones(spec: str) -> None:
    with pytest.raises(InvalidRequest, match=r"there are fcfs, round_robin, .*deadline.* FILE\.py:CLASS") as error:
        create(spec)
    assert error.value.status == 400
    with pytest.raises(InvalidRequest):
        describe(spec)
    assert not is_builtin(spec)


# -- files and modules --------------------------------------------------------------------------------------------


def test_a_class_without_name_and_params(mine: Path) -> None:
    policy = create("./mine.py:Mine", {"size": "2", "share": "0.25", "label": "7"})
    assert policy.name == "Mine"
    assert policy.params() == {"size": 2, "share": 0.25, "label": "7"}
    policy.add(seq(1))
    assert policy.plan(moment()).tokens == {1: 2}
    policy.remove(1)
    assert policy.plan(moment()).tokens == {}
    assert not is_builtin("./mine.py:Mine")
    assert create(f"{mine}:Mine").params() == {"size": 3, "share": 0.5, "label": None}
    assert create(f"{mine}:Mine", {"label": None}).params()["label"] is None


def test_a_class_with_everything_is_used_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    more = "    name = 'my own'\n    def params(self):\n        return {'x': 1}\n"
    file.write_text(MINE + more)
    policy = create(f"{file}:Mine")
    assert (type(policy).__name__, policy.name, policy.params()) == ("Mine", "my own", {"x": 1})


def test_what_names_code_is_known_before_it_runs() -> None:
    assert names_code("./mine.py:Mine")
    assert names_code("package.module:Mine")
    assert names_code("srpt", {"prefill_budget": 5, "predictor": "./mine.py:Mine"})
    assert not names_code("srpt", {"prefill_budget": 5, "predictor": "mean"})
    assert not names_code("fcfs")


def test_a_file_is_read_anew(mine: Path) -> None:
    assert create("./mine.py:Mine").params()["size"] == 3
    mine.write_text(MINE.replace("size: int = 3", "size: int = 4"))
    assert create("./mine.py:Mine").params()["size"] == 4
    assert "mine" not in sys.modules


def test_a_module(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(mine.parent))
    assert create("mine:Mine").params()["size"] == 3
    sys.modules.pop("mine")
    assert isinstance(create("mullama.scheduling.fcfs:Fcfs"), Fcfs)


def test_a_subclass_of_a_builtin(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from mullama.scheduling import Fcfs, Param\n"
        "class Mine(Fcfs):\n"
        "    'Fcfs with a knob.'\n"
        "    PARAMS = (*Fcfs.PARAMS, Param('knob', 1, 'turns', minimum=0))\n"
    )
    policy = create(f"{file}:Mine", {"knob": "5"})
    assert policy.name == "Mine"
    assert policy.params()["knob"] == 5
    assert describe(f"{file}:Mine")["params"][-1] == {
        "name": "knob",
        "default": 1,
        "range": "a whole number, 0 or more",
        "help": "turns",
    }


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"size": "many"}, "size must be a whole number, not 'many'"),
        ({"size": 1.5}, "size must be a whole number"),
        ({"share": True}, "share must be a number"),
        ({"label": 5}, "label must be a text"),
        ({"speed": 5}, "has no parameter 'speed'; its parameters are size, share, label"),
    ],
)
def test_wrong_parameters_of_a_file(mine: Path, params: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        create("./mine.py:Mine", params)


@pytest.mark.parametrize(
    ("spec", "error", "reason"),
    [
        ("./none.py:Mine", InvalidRequest, "cannot read the scheduler file none.py: No such file"),
        ("./mine.py:Nobody", InvalidRequest, "has no 'Nobody' to use as scheduler; its classes are Record, Mine"),
        ("./mine.py:", InvalidRequest, "is named FILE.py:CLASS"),
        (":Mine", InvalidRequest, "is named FILE.py:CLASS"),
        ("no_such_module_x:Mine", InvalidRequest, "there is no module 'no_such_module_x'"),
        ("mullama.no_such:Mine", InvalidRequest, "there is no module 'mullama.no_such'"),
        ("./mine.py:Record", PluginError, "has no method add, remove, plan"),
        ("./mine.py:dataclass", PluginError, "is a function, a class is needed"),
    ],
)
def test_what_cannot_be_found_or_used(mine: Path, spec: str, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        create(spec)


METHODS = "    def add(self, seq): pass\n    def remove(self, seq_id): pass\n    def plan(self, state): pass\n"


@pytest.mark.parametrize(
    ("source", "error", "reason"),
    [
        ("class Mine(:", PluginError, r"SyntaxError.*line 1"),
        ("import nothing_of_the_kind", PluginError, "ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        ("1/0", PluginError, "ZeroDivisionError"),
        (f"class Mine:\n{METHODS}    def __init__(self): 1/0", PluginError, "cannot make .* ZeroDivisionError"),
        (f"class Mine:\n{METHODS}    def __init__(self): raise ValueError('odd')", InvalidRequest, "refuses.*odd"),
        (f"class Mine:\n{METHODS}    def __init__(self, x): pass", InvalidRequest, "needs a value for x"),
        ("class Mine:\n    add = remove = 1\n    def plan(self, state): pass", PluginError, "no method add, remove;"),
    ],
)
def test_broken_files_are_reported(tmp_path: Path, source: str, error: type[Exception], reason: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(source)
    before = set(sys.modules)
    with pytest.raises(error, match=reason):
        create(f"{file}:Mine")
    if error is PluginError and "class" not in source:
        assert set(sys.modules) == before


def test_a_class_that_takes_anything(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"class Mine:\n{METHODS}    def __init__(self, **more): self.more = more")
    assert create(f"{file}:Mine", {"x": "1"}).params() == {"x": "1"}


# -- entry points --------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package as pip would install it, with a good policy and a broken one."""
    (tmp_path / "third_party_policies.py").write_text(MINE)
    info = tmp_path / "third_party_policies-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third_party_policies\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[mullama.schedulers]\nmine = third_party_policies:Mine\nbroken = third_party_policies:Nobody\n"
        "fcfs = third_party_policies:Mine\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(SCHEDULERS, "_loaded", {})
    return tmp_path


def test_an_installed_policy_works_by_its_name(installed: Path) -> None:
    policy = create("mine", {"size": 9})
    assert policy.params()["size"] == 9
    assert not is_builtin("mine")
    assert describe("mine")["summary"] == "Lets one run at a time."
    assert describe("mine")["source"] == "my head"
    assert [(p["name"], p["default"], p["range"]) for p in describe("mine")["params"]] == [
        ("size", 3, "a whole number"),
        ("share", 0.5, "a number"),
        ("label", None, "a text"),
    ]
    with pytest.raises(InvalidRequest, match=r"there are fcfs, .*, broken, mine, and FILE"):
        create("other")


def test_a_builtin_name_cannot_be_taken(installed: Path) -> None:
    assert isinstance(create("fcfs"), Fcfs)


def test_a_broken_one_is_listed_with_its_error(installed: Path) -> None:
    policies = {policy["name"]: policy for policy in describe_all()}
    assert list(policies) == [*BUILTINS, "broken", "mine"]
    assert "has no attribute 'Nobody'" in policies["broken"]["error"]
    with pytest.raises(PluginError, match="Nobody"):
        create("broken")


# -- mullama schedulers ----------------------------------------------------------------------------------------------


def test_the_list(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedulers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", *BUILTINS, "broken", "mine"]
    assert lines[-1].split(None, 1)[1] == "Lets one run at a time."
    assert "broken: cannot load" in lines[-2]


def test_the_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedulers", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[: len(BUILTINS)] == describe_all()[: len(BUILTINS)]


def test_one_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedulers", "fair"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("fair: ") and "Sheng et al." in out
    for param in describe("fair")["params"]:
        (line,) = [line for line in out.splitlines() if line.startswith(f"{param['name']} ")]
        assert param["range"] in line and param["help"] in line
    assert main(["schedulers", "srpt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == describe("srpt")


def test_a_file_of_ones_own(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedulers", "./mine.py:Mine"]) == 0
    out = capsys.readouterr().out
    assert "Lets one run at a time." in out and "label" in out


def test_an_unknown_policy_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedulers", "nonsense"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("value", [10**30, -(10**30), "1" + "0" * 400, "9" * 30, 1 << 63])
def test_whole_numbers_that_nobody_can_hold_are_refused(value: object) -> None:
    """They were taken, and then the answer could not be written: 500, and the policy had changed."""
    policy = create("fcfs")
    with pytest.raises(InvalidRequest, match="prefill_budget must be a whole number"):
        policy.configure(prefill_budget=value)  # type: ignore[attr-defined]
    assert policy.params()["prefill_budget"] == 512
