"""mullama's own files: a workload as it is played, and what became of it; JSON, one record a line.

A trace begins with a line that says what it is; each further line is one request, with ``client`` where it belongs to a
closed-loop client. A file of outcomes can be read as a trace as well: its requests, open loop, when they were sent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mullama.errors import ConfigError
from mullama.files import read_file, write_text
from mullama.workload.base import Client, Outcome, TraceRequest, Workload
from mullama.workload.grammar import MAX_SECONDS, MAX_TOKENS

FORMAT = "mullama-trace"
VERSION = 1
_FIELDS = {field.name: field.default for field in fields(TraceRequest)}

T = TypeVar("T")


class _Head(msgspec.Struct, forbid_unknown_fields=True):
    """The first line of a trace. ``think_s`` has one entry a client."""

    format: str
    version: int
    spec: str = ""
    seed: int = 0
    stop_s: float | None = None
    think_s: list[float] = []


def write_trace(path: Path, workload: Workload) -> None:
    """Write a workload to a file (``-``: stdout), so that ``read_trace`` gives an equal one."""
    head = _Head(FORMAT, VERSION, workload.spec, workload.seed, workload.stop_s, [c.think_s for c in workload.clients])
    lines = [json.dumps(msgspec.to_builtins(head), ensure_ascii=False)]
    lines += [_dump(request) for request in workload.requests]
    for number, client in enumerate(workload.clients):
        lines += [_dump(request, client=number) for request in client.requests]
    write_text(path, "\n".join(lines) + "\n")


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write outcomes, one a line, in the order of their index; times are rounded to microseconds."""
    lines = []
    for outcome in sorted(outcomes, key=lambda outcome: outcome.index):
        record = {field.name: getattr(outcome, field.name) for field in fields(Outcome)}
        record["request"] = _plain(outcome.request)
        record["token_s"] = [round(at_s, 6) for at_s in outcome.token_s]
        record["finished_s"] = round(outcome.finished_s, 6)
        lines.append(json.dumps(record, ensure_ascii=False))
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_trace(path: Path) -> Workload:
    """The workload of a file, or of the requests of a file of outcomes. Raises ConfigError that names the line."""
    head = _Head(FORMAT, VERSION)
    requests: list[TraceRequest] = []
    clients: dict[int, list[TraceRequest]] = {}
    for number, (record, where) in enumerate(_records(path)):
        if "format" in record and number == 0:
            head = _head(record, where)
            clients = {client: [] for client in range(len(head.think_s))}
        elif "request" in record:
            requests.append(_outcome(record, where).request)
        elif "client" in record:
            client = record.pop("client")
            if client not in clients:
                raise ConfigError(f"{where}: client {client!r} has no think_s in the first line", param="client")
            clients[client].append(_request(record, where))
        else:
            requests.append(_request(record, where))
    if not requests and not any(clients.values()):
        raise ConfigError(f"{path} holds no request", param="file")
    return Workload(
        requests=tuple(sorted(requests, key=lambda request: request.at_s)),
        clients=tuple(Client(tuple(clients[i]), think_s) for i, think_s in enumerate(head.think_s)),
        stop_s=head.stop_s,
        spec=head.spec,
        seed=head.seed,
    )


def _plain(request: TraceRequest) -> dict[str, Any]:
    return {name: value for name, value in asdict(request).items() if value != _FIELDS[name]}


def _dump(request: TraceRequest, **more: int) -> str:
    return json.dumps({**more, **_plain(request)}, ensure_ascii=False)


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Every line as an object, and how to name it."""
    try:
        data = read_file(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the trace file {path}: {reason}", param="file") from None
    for number, line in enumerate(data.splitlines(), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            record = msgspec.json.decode(line)
        except (ValueError, RecursionError):
            raise ConfigError(f"{where} is not JSON", param="file") from None
        if not isinstance(record, dict):
            raise ConfigError(f"{where} is not a JSON object", param="file")
        yield record, where


def _convert(record: dict[str, Any], kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(record, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}", param="file") from None


def _head(record: dict[str, Any], where: str) -> _Head:
    head = _convert(record, _Head, where)
    if head.format != FORMAT or head.version != VERSION:
        raise ConfigError(
            f"{where}: format {head.format} {head.version} is not {FORMAT} {VERSION}, which is what mullama reads",
            param="format",
        )
    times = [*head.think_s, head.stop_s or 0.0]
    if not all(0 <= seconds <= MAX_SECONDS for seconds in times):
        raise ConfigError(f"{where}: think_s and stop_s must be between 0 and {MAX_SECONDS:g}", param="think_s")
    return head


def _outcome(record: dict[str, Any], where: str) -> Outcome:
    known = [field.name for field in fields(Outcome)]
    _refuse_unknown(record, known, where)
    outcome = _convert(record, Outcome, where)
    _check(outcome.request, where)
    return outcome


def _request(record: dict[str, Any], where: str) -> TraceRequest:
    _refuse_unknown(record, _FIELDS, where)
    request = _convert(record, TraceRequest, where)
    _check(request, where)
    return request


def _refuse_unknown(record: dict[str, Any], known: Iterable[str], where: str) -> None:
    unknown = [name for name in record if name not in set(known)]
    if unknown:
        raise ConfigError(f"{where}: unknown field '{unknown[0]}'; there are {', '.join(known)}", param=unknown[0])


def _check(request: TraceRequest, where: str) -> None:
    """What the types do not say."""
    for name in ("prompt_tokens", "output_tokens"):
        if not 1 <= getattr(request, name) <= MAX_TOKENS:
            raise ConfigError(f"{where}: {name} must be between 1 and {MAX_TOKENS}", param=name)
    if not (math.isfinite(request.at_s) and 0 <= request.at_s <= MAX_SECONDS):
        raise ConfigError(f"{where}: at_s must be between 0 and {MAX_SECONDS:g}", param="at_s")
    if request.slo_ms is not None and not 0 < request.slo_ms <= MAX_SECONDS:
        raise ConfigError(f"{where}: slo_ms must be above 0 and at most {MAX_SECONDS:g}", param="slo_ms")
    if request.blocks and request.block_tokens < 1:
        raise ConfigError(f"{where}: blocks need block_tokens, at least 1", param="block_tokens")
