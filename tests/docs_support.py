"""The documentation as data: pages, fenced blocks, code spans, tables, anchors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
#: Every page a user reads.
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS, ROOT / "bench" / "README.md", ROOT / "vendor" / "README.md"]

_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?:(?: {4}[^\n]*|[ \t]*)\n)+")
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block. ``info`` is what stands behind the fence, such as ``python model``."""

    page: Path
    line: int
    info: str
    text: str

    @property
    def id(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *infos: str) -> Iterator[Block]:
    """The fenced blocks of a page; with ``infos`` only those tagged so."""
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        info = match[1].strip()
        if not infos or info in infos:
            yield Block(page, text.count("\n", 0, match.start()) + 1, info, match[2])


def all_blocks(*infos: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, *infos)]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """The inline code of a page."""
    return _SPAN.findall(prose(page))


def shell_text(page: Path) -> str:
    """Every line of a page that may be a command: shell and plain blocks, indented blocks, inline code."""
    fenced = [block.text for block in blocks(page) if block.info.split(" ")[0] in ("", "sh", "console", "bash")]
    indented = [match[0] for match in _INDENTED.finditer(prose(page))]
    return "\n".join([*fenced, *indented, *spans(page)])


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(match[1]) for match in re.finditer(r"^#+ (.*)$", prose(page), re.MULTILINE)}


def table(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    section = re.split(rf"^#+ {re.escape(heading)}[ \t]*$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(section) == 2, f"{name_of(page)} has {len(section) - 1} headings '{heading}'"
    lines = re.split(r"^#+ ", section[1], maxsplit=1, flags=re.MULTILINE)[0].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def names(page: Path, heading: str) -> list[str]:
    """The first column of a table, code marks removed."""
    return [row[0].strip("`") for row in table(page, heading)]


@dataclass(frozen=True, slots=True)
class Call:
    """A function that a page names: its file in the package, its qualified name, and whose thread calls it."""

    thread: str
    file: str
    function: str

    @property
    def name(self) -> str:
        """Without its class."""
        return self.function.rpartition(".")[2]


def calls(page: Path, heading: str) -> list[Call]:
    """The calls of a table (thread or subject, file, functions …); an empty first cell is the one above."""
    found: list[Call] = []
    first = ""
    for row in table(page, heading):
        first = row[0] or first
        functions = _SPAN.findall(row[2])
        assert functions, f"{name_of(page)}, {heading}: no function in {row}"
        found += [Call(first, row[1].strip("`"), function.removesuffix("()")) for function in functions]
    return found
