"""The map of mullama/: what knows what, where a class lives, how many files a folder has, what files are called.

Read from the sources; nothing is imported. Imports for types alone, and those inside functions, count like all others.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "mullama"
SOURCES = (".py", ".pyx", ".pxd", ".pyi", ".h", ".c", ".cpp")
MAX_FILES = 14
#: What every subject may have one of.
SHARED_NAMES = {"__init__", "base", "registry", "control", "report"}


# -- imports ------------------------------------------------------------------------------------------------------


@cache
def modules() -> dict[str, list[Path]]:
    """Dotted name -> its files: one of Python, or a ``.pyx`` with its ``.pxd`` and ``.pyi``."""
    found: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(PACKAGE.rglob("*")):
        if file.suffix in (".py", ".pyx", ".pxd", ".pyi"):
            found[name_of(file)].append(file)
    return found


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(text: str, suffix: str) -> Iterator[tuple[str, str]]:
    """(module, name) of every ``from module import name``; the name of an ``import module`` is ""."""
    if suffix in (".py", ".pyi"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"a relative import: {ast.unparse(node)}"
                yield from ((node.module or "", alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names)
        return
    for module, names in re.findall(r"^\s*from ([\w.]+) c?import (\([^)]*\)|.*)", text, re.MULTILINE):
        yield from ((module, name) for name in re.findall(r"(\w+)(?: as \w+)?", names.split("#")[0]))
    yield from ((module, "") for module in re.findall(r"^\s*c?import ([\w.]+)", text, re.MULTILINE))


def targets(files: Iterable[Path]) -> set[str]:
    """The modules of mullama that these files import from: ``from mullama.kv import cache`` means the file cache."""
    known = modules()
    pairs = [pair for file in files for pair in imported(file.read_text(encoding="utf-8"), file.suffix)]
    full = [f"{module}.{name}" if f"{module}.{name}" in known else module for module, name in pairs]
    return {name for name in full if name in known}


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """The groups of nodes that reach one another."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = edges.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    reached = {node: reach(node) for node in edges}
    found: list[set[str]] = []
    for node in edges:
        group = {other for other in reached[node] if node in reached[other]}
        if group and group not in found:
            found.append(group)
    return found


def test_files_import_in_no_circle() -> None:
    edges = {name: targets(files) - {name} for name, files in modules().items()}
    compiled = [of for name, of in edges.items() if name.startswith("mullama._core.")]
    assert edges["mullama.web.app"] and any(compiled), "the reading of imports has come apart"
    found = [
        sorted(f"{node} -> {other}" for node in group for other in edges[node] & group) for group in circles(edges)
    ]
    assert found == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}]


# -- classes ------------------------------------------------------------------------------------------------------


@dataclass
class Class:
    name: str
    module: str
    bases: list[str]  # "module:Name" of those in the package, the written text of others
    is_interface: bool = False  # a protocol, or with abstract methods: others write them, and that is its use
    has: set[str] = field(default_factory=set)  # attributes it sets, methods it has
    stubs: set[str] = field(default_factory=set)  # methods with nothing in them, constants without a value
    reads: set[str] = field(default_factory=set)  # attributes and methods it uses of ``self``

    @property
    def key(self) -> str:
        return f"{self.module}:{self.name}"


_DATA = re.compile(r"TypedDict|NamedTuple|Struct|Enum")


def resolved(base: ast.expr, module: str, names: dict[str, str]) -> str:
    text = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
    head, _, rest = text.rpartition(".")
    return names.get(text) or (f"{names[head].replace(':', '.')}:{rest}" if head in names else text)


def is_empty(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Nothing but a docstring, ``...`` or ``raise NotImplementedError``."""
    body = [one for one in function.body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
    return not body or (isinstance(body[0], ast.Raise) and "NotImplementedError" in ast.unparse(body[0]))


def read_class(node: ast.ClassDef, module: str, names: dict[str, str]) -> Class:
    one = Class(node.name, module, [resolved(base, module, names) for base in node.bases])
    marks = " ".join(ast.unparse(mark) for mark in node.decorator_list)
    is_data = "dataclass" in marks or any(_DATA.search(base) for base in one.bases)
    one.is_interface = any(base.rpartition(":")[2] == "Protocol" for base in one.bases)
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            one.is_interface |= "abstractmethod" in " ".join(map(ast.unparse, item.decorator_list))
            (one.stubs if is_empty(item) else one.has).add(item.name)
        elif isinstance(item, ast.AnnAssign) and (item.value is not None or is_data):
            one.has.add(ast.unparse(item.target))
        elif isinstance(item, ast.AnnAssign) and "ClassVar" in ast.unparse(item.annotation):
            one.stubs.add(ast.unparse(item.target))
        elif isinstance(item, ast.Assign):
            one.has |= {ast.unparse(target) for target in item.targets}
    for item in ast.walk(node):
        if isinstance(item, ast.Attribute) and ast.unparse(item.value) == "self":
            (one.has if isinstance(item.ctx, ast.Store) else one.reads).add(item.attr)
    return one


def classes_of(module: str, texts: dict[str, str]) -> list[Class]:
    """The classes of a module; ``texts`` are its files by suffix."""
    tree = ast.parse(texts.get(".py", ""))
    names = {name: f"{source}:{name}" for suffix, text in texts.items() for source, name in imported(text, suffix)}
    names |= {node.name: f"{module}:{node.name}" for node in tree.body if isinstance(node, ast.ClassDef)}
    found = [read_class(node, module, names) for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for name, base in re.findall(r"^cdef class (\w+)(?:\((\w+)\))?:", texts.get(".pyx", ""), re.MULTILINE):
        found.append(Class(name, module, [names.get(base, f"{module}:{base}")] * bool(base)))
    return found


def used_for_itself(name: str, texts: Iterable[str]) -> bool:
    """Whether somebody constructs, raises or registers this class: a use that is no base, no import and no type."""
    pattern = re.compile(
        rf"^(?!\s*(?:cdef )?class ).*(?:\b{name}(?:\.__new__)?\(|mullama[\w.]+:{name}\")", re.MULTILINE
    )
    return any(pattern.search(text) for text in texts)


def halves(found: dict[str, dict[str, str]]) -> Iterator[str]:
    """A line for each class that is not whole; ``found`` are the modules with their texts."""
    known = {one.key: one for module, texts in found.items() for one in classes_of(module, texts)}

    def line_of(one: Class) -> list[Class]:
        """A class and what it inherits from."""
        return [one, *(above for base in one.bases if base in known for above in line_of(known[base]))]

    heirs = defaultdict(list)
    for one in known.values():
        for above in line_of(one)[1:]:
            heirs[above.key].append(one)
    for key, one in known.items():
        others = [heir for heir in heirs[key] if heir.module != one.module]
        if not others or one.is_interface:
            continue
        direct = [heir for heir in heirs[key] if key in heir.bases]
        code = (text for texts in found.values() for suffix, text in texts.items() if suffix in (".py", ".pyx"))
        if len(direct) == 1 and direct[0].module != one.module and not used_for_itself(one.name, code):
            yield f"{key} is the first half of {direct[0].key}"
        own = set().union(*(above.has for above in line_of(one)))
        if len(heirs[key]) > 1:  # several classes fill in what it leaves open
            own |= one.stubs
        for heir in others:
            if left := sorted((one.reads | one.stubs) & heir.has - own):
                yield f"{key} uses what {heir.key} has: {', '.join(left)}"


def test_a_class_is_whole() -> None:
    """No class is cut in two: the base of one class alone, in another file, which nothing else uses.

    Nor is there a part of a class (a mixin) that uses what only its host has. Protocols and abstract methods are for
    others to fill in: they are not meant.
    """
    texts = {
        name: {file.suffix: file.read_text(encoding="utf-8") for file in files} for name, files in modules().items()
    }
    assert list(halves(texts)) == []


def test_a_class_in_two_files_is_found() -> None:
    mixin = "class Methods:\n    core: int\n    def run(self): return self.core"
    host = "from mullama.a import Methods\nclass {0}(Methods):\n    def __init__(self): self.core = 1\n{0}()"
    one = {"mullama.a": {".py": mixin}, "mullama.b": {".py": host.format("Engine")}}
    uses = "mullama.a:Methods uses what mullama.b:Engine has: core"
    assert list(halves(one)) == ["mullama.a:Methods is the first half of mullama.b:Engine", uses]
    two = one | {"mullama.c": {".py": host.format("Other")}}
    assert list(halves(two)) == [uses, "mullama.a:Methods uses what mullama.c:Other has: core"]
    below = {".pyx": "cdef class Core(Slots):\n    pass", ".pxd": "from mullama.a cimport Slots"}
    cut = {"mullama.a": {".pyx": "cdef class Slots:\n    pass"}, "mullama.b": below}
    assert list(halves(cut)) == ["mullama.a:Slots is the first half of mullama.b:Core"]
    cut["mullama.a"][".pyx"] += "\nslots = Slots()"
    assert list(halves(cut)) == []


#: Not private, for all their underscore: ``os._exit``, and what a named tuple has.
NOT_PRIVATE = {"_exit", "_replace"}


def reaches(text: str) -> set[str]:
    """What a file uses of the insides of objects that are not its own."""
    tree = ast.parse(text)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own = {node.attr for node in nodes if ast.unparse(node.value) in ("self", "cls")} | {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    private = [node for node in nodes if re.match(r"_(?!_)", node.attr) and node.attr not in own | NOT_PRIVATE]
    return {ast.unparse(node) for node in private if ast.unparse(node.value) != "super()"}


def test_no_file_reaches_into_another_s_classes() -> None:
    """A function that needs the privates of a class is a method of it, wherever it stands."""
    found = {
        name: reaches(file.read_text(encoding="utf-8"))
        for name, (file, *_) in modules().items()
        if file.suffix == ".py"
    }
    assert {name: names for name, names in found.items() if names} == {}
    assert reaches("def of(engine): return engine._core, engine.core") == {"engine._core"}


# -- folders and names --------------------------------------------------------------------------------------------


def sources() -> list[Path]:
    return [file for file in sorted(PACKAGE.rglob("*")) if file.suffix in SOURCES]


def test_folders_are_small() -> None:
    count = Counter(file.parent.relative_to(PACKAGE.parent).as_posix() for file in sources())
    assert count["mullama"] > 5
    large = {folder: number for folder, number in count.items() if number > MAX_FILES}
    assert large == {}


def test_a_name_is_one_file() -> None:
    """A module's files (``.pyx``, ``.pxd``, ``.pyi``, and its header) are one; another folder's has another name."""
    places = defaultdict(set)
    for file in sources():
        places[file.stem].add(file.parent.relative_to(PACKAGE.parent).as_posix())
    twice = {name: sorted(where) for name, where in places.items() if len(where) > 1}
    assert "__init__" in twice
    assert {name: where for name, where in twice.items() if name not in SHARED_NAMES} == {}
