"""The documentation says what the code does: links, commands, endpoints, field lists, names, examples."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import time
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from docs_support import (
    DOCS,
    PAGES,
    ROOT,
    Block,
    all_blocks,
    anchors,
    blocks,
    name_of,
    names,
    prose,
    shell_text,
    spans,
    table,
)

from mullama import abi, types
from mullama.cli.main import COMMANDS, cli
from mullama.config import ServeConfig
from mullama.engine.requests.lifecycle import TRANSITIONS
from mullama.scheduling import Batching, EngineState, Scheduler, SeqView, describe, registry
from mullama.scheduling.batching import COMMON
from mullama.serving.manager import ModelManager
from mullama.web.app import create_app
from mullama.web.openapi.document import served
from mullama.web.services import Services

ARCHITECTURE = ROOT / "docs" / "architecture.md"
INSTRUMENTATION = ROOT / "docs" / "instrumentation.md"
SCHEDULERS = ROOT / "docs" / "schedulers.md"
LLAMA = ROOT / "docs" / "llama.md"
PACKAGE = ROOT / "mullama"

by_name = pytest.mark.parametrize("page", PAGES, ids=name_of)


# -- links ---------------------------------------------------------------------------------------------


@by_name
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)} links to {target}; there are {sorted(anchors(file))}"


def test_the_index_lists_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    text = index.read_text(encoding="utf-8")
    missing = [page.name for page in DOCS if page != index and f"]({page.name})" not in text]
    assert not missing


@by_name
def test_named_files_exist(page: Path) -> None:
    made = ("mullama/lib", "vendor/llama.cpp", "build/", "bench/results")  # by a build or a run
    for span in spans(page):
        if re.fullmatch(r"(mullama|tests|bench|docs|vendor)/[\w./-]+", span) and not span.startswith(made):
            assert (ROOT / span).exists() or span.endswith("/llama.cpp"), f"{name_of(page)} names {span}"


# -- commands and options -------------------------------------------------------------------------------


def flags_of(command: click.Command) -> set[str]:
    given = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    if isinstance(command, click.Group):
        given |= {flag for below in command.commands.values() for flag in flags_of(below)}
    return {flag for flag in given if flag.startswith("-")} | {"--help", "-h"}


FLAGS = {name: flags_of(cli.get_command(click.Context(cli), name) or cli) for name in COMMANDS}
_OWN = {"MULLAMA_HOME", "MULLAMA_CONFIG", "MULLAMA_URL"}
ENVIRONMENT = {f"MULLAMA_{option.name.upper()}" for option in fields(ServeConfig)} | _OWN


@by_name
def test_command_lines_are_real(page: Path) -> None:
    """Every ``mullama COMMAND --flag …`` uses a command and flags that exist."""
    lines = re.findall(
        r"(?:^|[|] *)(?: {4}|\$ )?(?:\w+=\S+ )*mullama +([A-Za-z-]+)([^\n|#]*)", shell_text(page), re.MULTILINE
    )
    for command, rest in lines:
        if command in ("COMMAND", "ready") or command.startswith("--"):  # "mullama ready on URL" is output
            continue
        assert command in COMMANDS, f"{name_of(page)}: mullama {command}"
        for flag in re.findall(r"(?<![\w-])--?[a-z][\w-]*", re.sub(r'"[^"]*"', "", rest)):
            assert flag in FLAGS[command], f"{name_of(page)}: mullama {command} {flag}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=name_of)
def test_options_in_the_text_are_real(page: Path) -> None:
    """A code span that begins with ``--`` is a flag of ours (or of vendor/fetch.py)."""
    known = set().union(*FLAGS.values())
    known |= set(re.findall(r'add_argument\("(--[\w-]+)"', (ROOT / "vendor" / "fetch.py").read_text(encoding="utf-8")))
    for span in spans(page):
        if match := re.match(r"(--[a-z][\w-]*)", span):
            assert match[1].rstrip("-") in known | {"--no"}, f"{name_of(page)}: {span}"


def test_there_is_a_command_line_in_the_readme() -> None:
    """The patterns above find what they are meant to find."""
    found = re.findall(r"^ {4}mullama (\w+)", shell_text(ROOT / "README.md"), re.MULTILINE)
    assert {"serve", "run", "pull", "list"} <= set(found)


@by_name
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for target in re.findall(r"(?:^|^ {4}|=\d+ )make ([a-z]+)", shell_text(page), re.MULTILINE):
        assert target in targets, f"{name_of(page)}: make {target}"


@by_name
def test_cmake_definitions_exist(page: Path) -> None:
    """``-C cmake.define.X`` names an option of ours or of ggml (whose own list is in the vendored source)."""
    ours = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    ggml = ROOT / "vendor" / "llama.cpp" / "ggml" / "CMakeLists.txt"
    theirs = ggml.read_text(encoding="utf-8") if ggml.exists() else None
    for option in set(re.findall(r"cmake\.define\.(\w+)", page.read_text(encoding="utf-8"))):
        if option.startswith("GGML_") and theirs is not None:
            assert re.search(rf"option\({option}\b", theirs), option
        elif not option.startswith("GGML_"):
            assert re.search(rf"\b(option|set)\({option} ", ours), option


@by_name
def test_environment_variables_exist(page: Path) -> None:
    tests = {"MULLAMA_TEST_MODEL", "MULLAMA_TEST_GEMMA", "MULLAMA_LONG", "MULLAMA_SEED"}
    header = (PACKAGE / "abi.h").read_text(encoding="utf-8")
    build = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    for variable in set(re.findall(r"\bMULLAMA_[A-Z_]+\b", page.read_text(encoding="utf-8"))):
        known = variable in ENVIRONMENT | tests or variable in header
        assert known or re.search(rf"\b(option|set)\({variable} ", build), f"{name_of(page)}: {variable}"


# -- endpoints ---------------------------------------------------------------------------------------------

NOT_YET = {"/metrics"}  # named by the README as missing


@pytest.fixture(scope="module")
def routes() -> Iterator[dict[str, set[str]]]:
    """Path -> methods, from the app itself."""
    config = ServeConfig()
    models = ModelManager()
    services = Services(config, models)
    app = create_app(config, models, services)
    found: dict[str, set[str]] = {}
    for one in served(app.routes):
        path = one.path.replace("{name}/adapters/{id}", "NAME/adapters/ID").replace("{name}", "NAME")
        found.setdefault(re.sub(r"\{\w+\}", "{id}", path), set()).add(one.method)
    yield found
    services.close()


@by_name
def test_endpoints_exist(page: Path, routes: dict[str, set[str]]) -> None:
    verb, server = r"(?:\b(GET|POST|PUT|PATCH|DELETE)`? +`?)?", r"(?<![\w.:/])(?:http://127\.0\.0\.1:\d+)?"
    pattern = verb + server + r"(/(?:v1|internal|health|ready|metrics)(?![\w-])[\w/{}-]*)"
    for method, path in re.findall(pattern, page.read_text(encoding="utf-8")):
        path = path.rstrip("/")
        if path in NOT_YET or path in {"/v1", "/internal"}:
            continue
        assert path in routes, f"{name_of(page)}: {path}"
        if method:
            assert method in routes[path], f"{name_of(page)}: {method} {path}"


def test_what_is_called_missing_is_missing(routes: dict[str, set[str]]) -> None:
    assert not NOT_YET & routes.keys(), "this exists now: take it out of NOT_YET and of the README"


def test_the_api_page_lists_every_endpoint(routes: dict[str, set[str]]) -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert [path for path in routes if f"`{path}`" not in text] == []


# -- architecture --------------------------------------------------------------------------------------------


def edges_of_the_code() -> set[tuple[str, str]]:
    return {(old.name, new.name) for old, targets in TRANSITIONS.items() for new in targets}


def test_the_diagram_is_the_lifecycle() -> None:
    (diagram,) = [block for block in all_blocks("mermaid") if block.page == ARCHITECTURE]
    edges = re.findall(r"^ +(\w+) --> (\w+)$", diagram.text, re.MULTILINE)
    assert set(edges) == edges_of_the_code()
    assert len(edges) == len(set(edges))


def test_the_table_is_the_lifecycle() -> None:
    rows = table(ARCHITECTURE, "The life of a sequence")
    assert {(row[0], row[1]) for row in rows} == edges_of_the_code()


BASE = {"types", "errors", "faults", "installation", "files", "home", "child", "config", "logs", "abi"}


def room_of(module: str) -> str | None:
    """The room of a dotted name, None for the package itself."""
    parts = module.split(".")
    if len(parts) < 2:
        return None
    return "base" if parts[1] in BASE else parts[1]


def imports_of(file: Path) -> set[str]:
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return set(re.findall(r"^\s*from (mullama[\w.]*) c?import", text, re.MULTILINE))
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mullama":
            whole = node.module == "mullama"
            found |= {f"mullama.{alias.name}" if whole else node.module for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "mullama"}
    return found


def test_rooms_import_what_the_table_says() -> None:
    """No more, and no less; and of rooms further down alone."""
    rows = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[2])) for row in table(ARCHITECTURE, "Rooms")}
    used: dict[str, dict[str, str]] = {room: {} for room in rows}
    for file in [f for pattern in ("*.py", "*.pyx", "*.pxd") for f in PACKAGE.rglob(pattern)]:
        relative = file.relative_to(PACKAGE)
        if relative.name in ("__init__.py", "__main__.py") and len(relative.parts) == 1:
            continue  # the package's lazy front, and the entry of `python -m`
        room = room_of(f"mullama.{relative.with_suffix('').as_posix().replace('/', '.')}")
        assert room in rows, f"{relative} is in no room of the table"
        for module in imports_of(file):
            other = room_of(module)
            # `from mullama import __version__` and the like name no room
            if other in (None, room) or (other not in rows and not (PACKAGE / f"{other}").exists()):
                continue
            used[room][other] = f"{relative} imports {module}"
    order = list(rows)
    for room, allowed in rows.items():
        more = [text for other, text in used[room].items() if other not in allowed]
        assert not more, f"not in the row of {room}: {more}"
        less = allowed - used[room].keys()
        assert not less, f"the row of {room} allows what no file imports: {less}"
        upward = [other for other in allowed if order.index(other) < order.index(room)]
        assert not upward, f"{room} imports from above: {upward}"
    assert all(used[room] or room == "base" for room in rows)


# -- names of functions ----------------------------------------------------------------------------------------

ELSEWHERE = {"monotonic_ns"}  # the standard library's


def definitions() -> set[str]:
    found = set()
    for file in (f for suffix in ("py", "pyx", "h", "cpp") for f in PACKAGE.rglob(f"*.{suffix}")):
        text = file.read_text(encoding="utf-8")
        found |= set(re.findall(r"\b(?:def|class) +(\w+)", text))
        if file.suffix == ".pyx":
            found |= set(re.findall(r"^ *cdef [^=\n]*?(\w+)\(", text, re.MULTILINE))
        elif file.suffix != ".py":
            found |= set(re.findall(r"^[^/\n]*?\b(\w+)\([^\n;]*\{$", text, re.MULTILINE))
    return found


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_functions_in_the_text_exist(page: Path) -> None:
    """Inline code of the form ``name()`` or ``Class.name(…)`` is defined in mullama."""
    known = definitions() | ELSEWHERE
    for span in spans(page):
        if match := re.fullmatch(r"(?:[\w.]+\.)?(\w+)\(.*\)", span):
            assert match[1] in known, f"{name_of(page)}: {span}"


def test_functions_of_llama_cpp_exist() -> None:
    vendored = ROOT / "vendor" / "llama.cpp"
    if not vendored.exists():
        pytest.skip("llama.cpp has not been fetched")
    headers = [*vendored.glob("include/*.h"), *vendored.glob("ggml/include/*.h"), *vendored.glob("common/*.h")]
    headers += vendored.glob("src/llama-c*.h")
    source = "".join(file.read_text(encoding="utf-8", errors="replace") for file in headers)
    unknown = [s for s in spans(LLAMA) if re.fullmatch(r"(llama|ggml|common)_\w+", s) and s not in source]
    assert unknown == []


def test_patches_are_explained() -> None:
    patches = sorted(file.name for file in (ROOT / "vendor" / "patches").glob("*.patch"))
    assert names(LLAMA, "The patch") == patches


def test_the_pinned_version_is_the_locked_one() -> None:
    lock = tomllib.loads((ROOT / "vendor" / "llama.lock.toml").read_text(encoding="utf-8"))
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall(r"build (b\d+)\b", text)) == {lock["upstream_commit"]}
    versions = re.findall(re.escape(lock["package"]) + r"[ =-]+(\d+\.\d+\.\d+)", text)
    assert versions
    assert set(versions) == {lock["version"]}


# -- instrumentation -------------------------------------------------------------------------------------------


def macro(name: str) -> list[tuple[str, str]]:
    """The (first, second) argument of every entry of an X-macro of abi.h."""
    text = (PACKAGE / "abi.h").read_text(encoding="utf-8")
    match = re.search(rf"#define {name}\([A-Z]\)(.*?[^\\])\n", text, re.DOTALL)
    assert match, name
    return re.findall(r"\b[FS]\((\w+), *(\w+)", match[1])


@pytest.mark.parametrize(
    ("heading", "name"),
    [
        ("Header", "MULLAMA_HEADER_FIELDS"),
        ("Counters", "MULLAMA_COUNTER_FIELDS"),
        ("Rows", "MULLAMA_ROW_FIELDS"),
        ("Events", "MULLAMA_EVENT_FIELDS"),
    ],
)
def test_fields_of_the_page(heading: str, name: str) -> None:
    in_code = [field for _, field in macro(name)]
    assert len(in_code) > 5
    assert names(INSTRUMENTATION, heading) == in_code


def test_call_sites() -> None:
    rows = [(row[0].strip("`"), row[1]) for row in table(INSTRUMENTATION, "Call sites")]
    assert rows == macro("MULLAMA_SITES")
    assert rows == [(name, str(number)) for number, name in abi.SITES.items()]


def test_what_call_sites_hold() -> None:
    text = (PACKAGE / "abi.h").read_text(encoding="utf-8")
    said = dict(re.findall(r'S\((\w+), *\d+, *"([^"]*)"\)', text))
    for row in table(INSTRUMENTATION, "Call sites"):
        held = [f"{letter} = {cell}" for letter, cell in zip("ab", row[3:], strict=True) if cell]
        assert ", ".join(held) == said[row[0].strip("`")]


def test_states_and_reasons() -> None:
    rows = {row[0].strip("`"): row[2] for row in table(INSTRUMENTATION, "Rows")}
    assert rows["state"] == ", ".join(f"{number} {name}" for number, name in abi.SLOT_STATES.items())
    reasons = {**abi.FINISH_REASONS, 0: "none yet"}
    assert rows["finish_reason"] == ", ".join(f"{number} {name}" for number, name in reasons.items())


def test_profile_fields() -> None:
    expected = [field.name for field in fields(types.Profile)]
    assert sorted(names(INSTRUMENTATION, "X-Profile")) == sorted(expected)


def test_json_examples() -> None:
    """JSON parses, and a profile in it has the fields that there are."""
    expected = [field.name for field in fields(types.Profile)]
    profiles = 0
    for block in all_blocks("json"):
        value = json.loads(block.text)
        profile = value.get("profile", value)
        if "kv_cache_hit" in profile:
            profiles += 1
            assert set(expected) <= set(profile), block.id
    assert profiles == 2


def keys_returned_by(module: str, function: str) -> list[str]:
    """The keys of the dict that a function of a module of the engine returns."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    returned = [node.value for node in ast.walk(found) if isinstance(node, ast.Return)]
    assert isinstance(returned[-1], ast.Dict)
    return [ast.literal_eval(key) for key in returned[-1].keys if key is not None]


@pytest.mark.parametrize(
    ("heading", "module", "function"),
    [("GET /internal/scheduler", "engine/planning/report", "scheduler"), ("GET /internal/kv", "kv/report", "snapshot")],
)
def test_internal_fields(heading: str, module: str, function: str) -> None:
    assert names(INSTRUMENTATION, heading) == keys_returned_by(module, function)


# -- scheduling -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [SeqView, EngineState])
def test_what_a_scheduler_sees(view: type[Any]) -> None:
    assert names(SCHEDULERS, view.__name__) == [field.name for field in fields(view)]


def test_the_methods_of_a_scheduler() -> None:
    methods = {name for name in vars(Scheduler) if not name.startswith("_") and callable(getattr(Scheduler, name))}
    said = {name.partition("(")[0] for name in names(SCHEDULERS, "The protocol")}
    assert said == methods | {"configure"}
    rules = re.findall(r"`(\w+)", " ".join(row[0] for row in table(SCHEDULERS, "The rules of Batching")))
    assert all(hasattr(Batching, rule) for rule in rules)
    assert {"rank", "order", "victims", "yields"} <= set(rules)


def parameter_rows(name: str) -> list[list[str]]:
    """The parameters of a policy as the page shows them."""
    rows = []
    for param in describe(name)["params"]:
        default = param["default"]
        shown = (
            str(default).lower()
            if isinstance(default, bool)
            else f"{default:g}"
            if isinstance(default, float)
            else default
        )
        rows.append([f"`{param['name']}`", str(shown), param["range"], param["help"]])
    return rows


@pytest.mark.parametrize("name", registry.BUILTINS)
def test_parameters_of_the_policies(name: str) -> None:
    rows = parameter_rows(name)
    common, own = rows[: len(COMMON)], rows[len(COMMON) :]
    assert table(SCHEDULERS, "Common parameters") == common
    assert own == (table(SCHEDULERS, name) if own else [])


def test_every_source_is_named() -> None:
    """Who described a policy first stands in its docstring's SOURCE and on the page."""
    text = " ".join(SCHEDULERS.read_text(encoding="utf-8").split())
    for name in registry.BUILTINS:
        authors = re.findall(r"([A-Z][a-z]+)(?: et al\.,|, [A-Z]| and )", describe(name)["source"])
        assert authors, name
        assert [author for author in authors if author not in text] == [], name


# -- changelog --------------------------------------------------------------------------------------------------


def test_changelog_has_the_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[Unreleased\]$", text, re.MULTILINE)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds


# -- examples ---------------------------------------------------------------------------------------------------

PYTHON = all_blocks("python", "python model", "python server")


def test_every_block_says_what_it_is() -> None:
    """A tag that no test knows would never run."""
    known = {"", "sh", "sh server", "toml", "json", "mermaid", "python", "python model", "python server"}
    assert [(block.id, block.info) for block in all_blocks() if block.info not in known] == []


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.id)
def test_python_blocks_compile(block: Block) -> None:
    compile(block.text, block.id, "exec")


def seal(block: Any) -> Any:
    """Close a counters or row block as the writer does."""
    words = (abi.u64 * (len(bytes(block)) // 8)).from_buffer(block)
    words[0] = 2
    words[len(words) - 1] = sum(words[1:-1]) & 0xFFFFFFFFFFFFFFFF
    return block


def write_page(file: Path) -> None:
    """A page as an engine would leave it: one running request, three events."""
    counters = abi.Counters(steps=7, decode_ns=980, busy_ns=1000, events=3, running=1)
    row = abi.Row(handle=5, state=abi.DECODE, slot=0, cells=12, completion_tokens=4)
    events = [abi.Event(seq=i + 1, time_ns=100 + i, kind=kind, slot=0, a=i, b=0) for i, kind in enumerate((3, 4, 5))]
    head = 128
    rows_at = head + abi.ctypes.sizeof(abi.Counters)
    events_at = rows_at + 2 * abi.ctypes.sizeof(abi.Row)
    size = events_at + 4 * abi.ctypes.sizeof(abi.Event)
    header = abi.Header(
        magic=abi.MAGIC, version=abi.VERSION, header_size=abi.ctypes.sizeof(abi.Header), page_size=size,
        counters_offset=head, counters_size=abi.ctypes.sizeof(abi.Counters), rows_offset=rows_at,
        row_size=abi.ctypes.sizeof(abi.Row), n_rows=2, events_offset=events_at, event_size=abi.ctypes.sizeof(abi.Event),
        n_events=4, pid=1, created_ns=time.monotonic_ns(),
    )  # fmt: skip
    body = bytes(header).ljust(head, b"\0") + bytes(seal(counters)) + bytes(seal(row)) + bytes(abi.Row())
    file.parent.mkdir(parents=True)
    file.write_bytes((body + b"".join(map(bytes, events))).ljust(size, b"\0"))


@pytest.mark.parametrize("block", all_blocks("python"), ids=lambda block: block.id)
def test_python_blocks_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untagged examples need no model; the runtime folder holds one page made by hand.

    A block that begins with ``# FILE.py`` is that file for the others of its page.
    """
    for other in blocks(block.page, "python"):
        if match := re.match(r"# (\w+\.py)\n", other.text):
            (tmp_path / match[1]).write_text(other.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    write_page(tmp_path / "run" / "mullama" / "1-model-0.page")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block.text, block.id, "exec"), {"__name__": "__main__"})
    if block.page == INSTRUMENTATION:
        assert out.getvalue().splitlines() == [
            "1-model-0.page: 7 steps, 98.0% of the busy time in llama_decode",
            "  slot 0: request 5, 12 cells, 4 tokens out",
            "  100 UBATCH_BEGIN slot 0 a=0 b=0",
            "  101 UBATCH_END slot 0 a=1 b=0",
            "  102 SAMPLE slot 0 a=2 b=0",
        ]
