"""The architecture page names what there is: functions in their files, folders, modules, parts, threads, queues."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from docs_support import DOCS, ROOT, Call, calls, names, table

PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = ROOT / "mullama"
TRACES = ["A chat, traced", "A swap, traced", "How it gets there", "How it comes back"]


@cache
def text_of(file: str) -> str:
    return (PACKAGE / file).read_text(encoding="utf-8")


@cache
def defined_in(file: str) -> frozenset[str]:
    """The qualified names of functions and classes of a Python file; those within functions by their name alone."""
    found = set()

    def look(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + child.name)
                look(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else "")
            else:
                look(child, prefix)

    look(ast.parse(text_of(file)), "")
    return frozenset(found)


def is_defined(call: Call) -> bool:
    if call.file.endswith(".py"):
        return call.function in defined_in(call.file)
    text = text_of(call.file)
    owner = call.function.rpartition(".")[0]
    if call.file.endswith(".pyx"):
        forms = [rf"^ *def {call.name}\(", rf"^ *cdef [^=\n]*\b{call.name}\("]
        return (not owner or f"cdef class {owner}:" in text) and any(re.search(f, text, re.MULTILINE) for f in forms)
    forms = [rf"^[^/\n;=]*\b{call.name}\([^;]*\) (?:const |noexcept )?\{{", rf"^#define {call.name}\("]
    return any(re.search(form, text, re.MULTILINE) for form in forms)


@pytest.mark.parametrize("heading", ["Where it is decided", *TRACES])
def test_functions_are_in_their_files(heading: str) -> None:
    named = calls(PAGE, heading)
    assert [call for call in named if not (PACKAGE / call.file).is_file()] == []
    assert [call for call in named if not is_defined(call)] == []
    assert len(named) >= 6


def test_a_newcomer_finds_a_function_by_its_subject() -> None:
    assert len(names(PAGE, "Where it is decided")) >= 50


@cache
def product() -> str:
    return "".join(
        file.read_text(encoding="utf-8") for kind in ("py", "pyx", "h") for file in sorted(PACKAGE.rglob(f"*.{kind}"))
    )


@pytest.mark.parametrize("heading", TRACES)
def test_compiled_functions_of_a_trace_are_called(heading: str) -> None:
    """A profile does not see them: so there is at least a call of each beside what defines it."""
    compiled = [call for call in calls(PAGE, heading) if not call.file.endswith(".py") and call.name != "__init__"]
    assert [call for call in compiled if call.thread != "core"] == []
    for call in compiled:
        assert re.search(rf"(?:\.|->|= |return ){call.name}\(", product()), f"nobody calls {call}"


def test_the_folders() -> None:
    named = set(names(PAGE, "Folders"))
    there = {
        file.parent.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("__init__.py")
        if file.parent != PACKAGE and file.relative_to(PACKAGE).parts[0] != "_core"
    }
    assert named == there


def test_the_modules_of_the_core() -> None:
    core = PACKAGE / "_core"
    there = {
        folder.name: (
            {file.stem for file in folder.glob("*.pyx")},
            {file.name for file in folder.glob("*.h")},
        )
        for folder in core.iterdir()
        if (folder / "__init__.py").exists()
    }
    named = {
        row[0].strip("`"): (set(re.findall(r"`(\w+)`", row[1])), set(re.findall(r"`([\w.]+)`", row[2])))
        for row in core_table()
    }
    assert named == there


def core_table() -> list[list[str]]:
    """The second table of its section."""
    section = PAGE.read_text(encoding="utf-8").partition("## Modules of the core\n")[2].partition("\n## ")[0]
    lines = section.partition("| folder |")[2].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]


@pytest.mark.parametrize("heading", ["An engine and its parts", "Modules of the core"])
def test_the_parts(heading: str) -> None:
    for row in table(PAGE, heading):
        name, file = row[0].strip("`"), row[1].strip("`")
        if name.startswith("engine."):
            kind = re.search(rf"self\.{name.removeprefix('engine.')} = (\w+)\(parts\)", text_of("engine/engine.py"))
            assert kind, name
            name = kind[1]
        assert re.search(rf"^(?:cdef )?class {name}\b", text_of(file), re.MULTILINE), (name, file)


def thread_names() -> set[str]:
    """What the product calls its threads; what is put in at run time is NAME."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            if ast.unparse(node.func) not in ("threading.Thread", "ThreadPoolExecutor"):
                continue
            given = {word.arg: word.value for word in node.keywords}
            name = given.get("name") or given.get("thread_name_prefix")
            assert name is not None, f"{file}:{node.lineno}: a thread without a name"
            parts = name.values if isinstance(name, ast.JoinedStr) else [name]
            found.add("".join(part.value if isinstance(part, ast.Constant) else "NAME" for part in parts))
    return found


def test_the_threads() -> None:
    named = {row[1].strip("`") for row in table(PAGE, "Threads") if row[1].startswith("`")}
    assert named == thread_names()


def queues_of(file: Path) -> set[str]:
    """Names of what a file makes to hand things from one thread or task to another."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Call):
            continue
        made, target = node.value, node.targets[0] if isinstance(node, ast.Assign) else node.target
        kind = ast.unparse(made.func).rpartition(".")[2]
        is_memory = any(word.arg == "maxlen" for word in made.keywords)  # of the latest, for whoever looks
        if kind in ("SimpleQueue", "Queue") or (kind == "deque" and not is_memory):
            found.add(ast.unparse(target).removeprefix("self."))
    return found


def test_the_queues() -> None:
    rows = table(PAGE, "Queues")
    named = {(row[1].strip("`"), row[2].strip("`")) for row in rows}
    for file, name in named:
        assert re.search(rf"\b{name}\b", text_of(file)), (file, name)
    told = {(row[1].strip("`"), name) for row in rows for name in re.findall(r"`(\w+)`", " ".join(row[2:]))}
    files = sorted(PACKAGE.rglob("*.py"))
    made = {(file.relative_to(PACKAGE).as_posix(), name) for file in files for name in queues_of(file)}
    assert made - told == set(), "queues that the page does not name"


def test_the_page_is_linked() -> None:
    assert any("architecture.md" in page.read_text(encoding="utf-8") for page in DOCS if page != PAGE)
