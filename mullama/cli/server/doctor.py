"""``mullama doctor``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import click

from mullama.cli.options import config_from, config_options, echo_json, json_option


@click.command(short_help="Say what this machine carries, and what keeps serve from starting.")
@config_options()
@json_option
def command(as_json: bool, **params: Any) -> int:
    """Say what processor, memory, folders and libraries there are, which ways of computing they allow, and what is
    wrong with them.

    It takes the options of serve, and finds what would keep serve from starting with them: a line each, with what to
    do. The exit status is 1 then. Nothing is fetched, and no model is loaded.
    """
    from mullama.errors import MachineUnfit
    from mullama.serving.readiness import look_around

    found, report = look_around(config_from(params))
    if as_json:
        echo_json(report)
        return 1 if found.faults else 0
    for name, lines in sections(report):
        for n, line in enumerate(lines):
            click.echo(f"{name if n == 0 else '':<14}{line}".rstrip())
    for note in found.notes:
        click.echo(f"{click.style('note:', fg='yellow')} {note}")
    if found.faults:
        raise MachineUnfit(found.faults)
    click.echo(click.style("nothing is wrong", fg="green"))
    return 0


def sections(report: dict[str, Any]) -> Iterator[tuple[str, Sequence[str]]]:
    """Each subject with its lines."""
    yield "processor", _processor(report["processor"])
    yield "instructions", _wrapped(report["processor"]["instruction_sets"])
    yield "threads", [_threads(report["threads"])]
    yield "memory", [_memory(report["memory"])]
    for name, folder in report["folders"].items():
        yield {"store": "store", "pages": "page folder"}.get(name, "cached KV"), [_folder(folder)]
    yield "build", _build(report["build"])
    yield "libraries", _libraries(report["libraries"])
    yield "devices", [_device(one) for one in report["devices"]] or ["unknown: the libraries are not loaded"]
    yield "constraints", [_constraints(report["constraints"])]
    yield "ways", _ways(report["ways"]) or ["not known yet: they are tried when a model is loaded first"]


def _processor(one: dict[str, Any]) -> list[str]:
    numbers = [f"{word} {one[word]}" for word in ("family", "model", "stepping") if one[word] is not None]
    lines = [f"{one['name'] or 'unknown'}, {one['architecture']}"]
    if one["vendor"] or numbers:
        lines.append(", ".join([*([one["vendor"]] if one["vendor"] else []), *numbers]))
    if one["amx"] is not None:
        lines.append("AMX tiles: " + ("the system allows them" if one["amx"]["supported"] else "the system has none"))
    return lines


def _threads(one: dict[str, Any]) -> str:
    own = len(one["affinity"])
    text = f"{one['used']} to compute with; {own} of {one['online']} cores may be used"
    if own < one["online"]:
        text += f" ({_ranges(one['affinity'])})"
    if one["quota"] is not None:
        text += f", a quota of {one['quota']:g} cores"
    return text + (", as --threads says" if one["asked"] else "")


def _ranges(cores: Sequence[int]) -> str:
    """Core numbers as the system writes them, such as 0-3,8."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _size(size: int | None) -> str:
    from mullama.files import human_size

    return "unknown" if size is None else human_size(size)


def _memory(one: dict[str, Any]) -> str:
    text = f"{_size(one['free_bytes'])} free of {_size(one['total_bytes'])}"
    return text + (f", a limit of {_size(one['limit_bytes'])}" if one["limit_bytes"] is not None else "")


def _folder(one: dict[str, Any]) -> str:
    room = f"{_size(one['free_bytes'])} free" if one["problem"] is None else f"nothing can be written: {one['problem']}"
    return f"{one['path']} ({room})"


def _build(one: dict[str, Any]) -> list[str]:
    if one["compiler"] is None:
        return [f"mullama {one['mullama']}, its record is missing", f"Python {one['python']}"]
    flags = [word for name in ("cxx_flags", "cpu_flags") for word in (one[name] or "").split(";") if word]
    missing = one["missing_instructions"]
    return [
        f"mullama {one['mullama']}, {one['compiler']}, {one['build_type']}, Python {one['python']}",
        "flags: " + " ".join(dict.fromkeys(flags)),
        *([f"uses what the processor lacks: {', '.join(missing)}"] if missing else []),
    ]


def _libraries(libraries: Sequence[dict[str, Any]]) -> list[str]:
    bad = [f"{one['path']} {one['problem']}" for one in libraries if one["problem"] is not None]
    good = [f"{one['name']} ({_size(one['size_bytes'])})" for one in libraries if one["problem"] is None]
    shared = [text for text in good if text.startswith(("lib", "mullama"))]
    modules = len(good) - len(shared)
    return [*bad, *shared, *([f"{modules} compiled modules"] if modules else [])] or ["none is known"]


def _device(one: dict[str, Any]) -> str:
    memory = f"{_size(one['memory_free'])} free of {_size(one['memory_total'])}"
    return f"{one['name']} ({one['type']}): {one['description']}, {memory}"


def _constraints(one: dict[str, Any] | None) -> str:
    if one is None:
        return "unknown: the libraries are not loaded"
    problem = one["problem"]
    return f"llguidance {one['version']}, by its C functions" if problem is None else f"none: {problem}"


def _ways(types: Sequence[dict[str, Any]]) -> list[str]:
    """Each type of weights with the way that is taken, then what came of each way there is."""
    lines = []
    for of in types:
        first, *others = of["chosen"].items()
        words = ", ".join([first[1], *(f"from {m} columns on {way}" for m, way in others)])
        lines.append(f"{of['type']}: {words}")
        for way in of["ways"]:
            times = ", ".join(f"{us:g} µs x {m}" for m, us in way["times_us"].items())
            verdict = way["verdict"] + (", exact" if way["exact"] else "")
            lines.append(f"  {way['way']}: {verdict}" + (f"; {times}" if times else ""))
    return lines


def _wrapped(words: Sequence[str], width: int = 90) -> list[str]:
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
