"""What an editor and `dir()` show of the Python API, without the compiled core."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from docs_support import table

import mullama
from mullama.types import GenerateOptions, Request, SamplingParams

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mullama"
OF_A_REQUEST = {"priority", "user", "slo_ms", "preempt", "cache_salt", "context_shift", "lora"}


def test_the_names_are_there() -> None:
    assert {"Engine", "SamplingParams", "GenerateOptions", "Request", "Profile", "Delta", "Finish"} <= set(dir(mullama))
    assert set(mullama.__all__) <= set(dir(mullama))


def test_dir_loads_nothing() -> None:
    code = "import sys, mullama; dir(mullama); sys.exit(any(m.startswith('mullama._core') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_options_are_all_there_are() -> None:
    """An option that is added to SamplingParams is completed by editors as well."""
    options = set(get_type_hints(GenerateOptions))
    assert options == {field.name for field in fields(SamplingParams)} | OF_A_REQUEST
    assert {field.name for field in fields(Request)} >= OF_A_REQUEST


def test_no_public_method_takes_anything() -> None:
    """Read from the source: ``**kwargs`` of the API are typed, so that a misspelt option is seen before it runs."""
    tree = ast.parse((ROOT / "mullama" / "api.py").read_text(encoding="utf-8"))
    (engine,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Engine"]
    taking = [
        node for node in engine.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.args.kwarg
    ]
    assert len(taking) >= 5
    for node in taking:
        assert node.args.kwarg is not None and node.args.kwarg.annotation is not None
        assert ast.unparse(node.args.kwarg.annotation) == "Unpack[GenerateOptions]", node.name


def test_numpy_comes_along() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(one.startswith("numpy") for one in project["dependencies"])


def test_what_is_not_public_says_so() -> None:
    """The homes of docs/architecture.md are there, and every other room calls itself internal."""
    homes = {row[0].strip("`") for row in table(ROOT / "docs" / "architecture.md", "What is public")}
    assert {"mullama", "mullama.abi", "mullama.scheduling"} <= homes
    for home in homes:
        assert importlib.import_module(home).__doc__
    rooms = [file for file in PACKAGE.glob("*/__init__.py") if not file.parent.name.startswith("_")]
    assert len(rooms) > 10
    texts = {file.parent.name: ast.get_docstring(ast.parse(file.read_text())) or "" for file in rooms}
    assert {room for room, text in texts.items() if "Internal" not in text} == {"scheduling"}


def test_the_homes_of_plugins_have_protocols() -> None:
    """Each of its homes has the protocols that it implements."""
    homes = {row[0].strip("`") for row in table(ROOT / "docs" / "architecture.md", "What is public")}
    for home in homes - {"mullama", "mullama.abi"}:
        module = importlib.import_module(home)
        protocols = [value for value in vars(module).values() if getattr(value, "_is_protocol", False)]
        assert [one for one in protocols if one.__module__.startswith(home)], home
