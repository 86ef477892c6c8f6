"""Real traces: the Azure LLM inference trace's CSV and the Mooncake trace's JSONL, scaled to a model and a machine.

Azure LLM inference trace 2023 (CC-BY 4.0): Patel et al., Splitwise, ISCA 2024. Mooncake trace (Apache-2.0): Qin et al.,
Mooncake, FAST 2025; its ``hash_ids`` name the 512-token blocks of a prompt, and equal ids can share KV.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from mullama.errors import ConfigError
from mullama.workload.base import TraceRequest, Workload
from mullama.workload.grammar import MAX_REQUESTS, MAX_SECONDS, MAX_TOKENS, Options

OPTIONS = ("n", "skip", "time_scale", "length_scale", "max_prompt", "max_out", "priority", "slo_ms")
MOONCAKE_BLOCK = 512  # tokens of a block in the trace
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(slots=True, frozen=True)
class _Row:
    """One request as the file has it."""

    at_s: float
    prompt: int
    out: int
    blocks: tuple[int, ...] = ()


def azure(path: str, text: str) -> Workload:
    """A CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens."""
    options = Options("azure", text, OPTIONS)
    scale = options.number("length_scale", 1.0, 1e-6, 1e6)
    return _scaled(options, _take(options, path, _azure_rows), scale, block=0)


def mooncake(path: str, text: str) -> Workload:
    """A JSONL with timestamp (ms), input_length, output_length and hash_ids.

    ``block``: what a block of 512 tokens becomes; with only one of ``block`` and ``length_scale`` the other follows.
    """
    options = Options("mooncake", text, (*OPTIONS, "block"))
    implied = options.whole("block", MOONCAKE_BLOCK, 1, MAX_TOKENS) / MOONCAKE_BLOCK
    scale = options.number("length_scale", implied, 1e-6, 1e6)
    block = options.whole("block", max(round(MOONCAKE_BLOCK * scale), 1), 1, MAX_TOKENS)
    return _scaled(options, _take(options, path, _mooncake_rows), scale, block=block)


def _scaled(options: Options, rows: Iterable[_Row], scale: float, *, block: int) -> Workload:
    time_scale = options.number("time_scale", 1.0, 0.0, 1e6)
    max_prompt = options.whole("max_prompt", MAX_TOKENS, 1, MAX_TOKENS)
    max_out = options.whole("max_out", MAX_TOKENS, 1, MAX_TOKENS)
    priority = options.whole("priority", 0, -(1 << 31), (1 << 31) - 1)
    slo_ms = options.maybe("slo_ms", 1e-3, MAX_SECONDS)
    ordered = sorted(rows, key=lambda row: row.at_s)
    requests = []
    for row in ordered:
        prompt = min(max(round(row.prompt * scale), 1), max_prompt)
        requests.append(
            TraceRequest(
                at_s=(row.at_s - ordered[0].at_s) * time_scale,
                prompt_tokens=prompt,
                output_tokens=min(max(round(row.out * scale), 1), max_out),
                priority=priority,
                slo_ms=slo_ms,
                blocks=row.blocks[: -(-prompt // block)] if block else (),
                block_tokens=block if row.blocks else 0,
            )
        )
    return Workload(requests=tuple(requests))


def _take(options: Options, path: str, read: Callable[[TextIO], Iterator[_Row]]) -> list[_Row]:
    skip = options.whole("skip", 0, 0, 1 << 40)
    n = options.whole("n", MAX_REQUESTS, 1, MAX_REQUESTS)
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = list(itertools.islice(read(file), skip, skip + n))
    except OSError as error:
        raise ConfigError(f"cannot read the trace file {path}: {error.strerror or error}", param=options.kind) from None
    except (ValueError, RecursionError, csv.Error) as error:
        raise ConfigError(f"{options.kind}: {path}: {error}", param=options.kind) from None
    if not rows:
        raise ConfigError(f"{options.kind}: {path} has no request left after skip={skip}", param="skip")
    return rows


# -- readers: each raises ValueError that names the line -------------------------------------------------------


def _azure_rows(file: TextIO) -> Iterator[_Row]:
    reader = csv.DictReader(file)
    missing = [name for name in AZURE_COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"the first line lacks {', '.join(missing)}; it must name {','.join(AZURE_COLUMNS)}")
    for record in reader:
        where = f"line {reader.line_num}"
        when, prompt, out = (record[name] or "" for name in AZURE_COLUMNS)
        try:
            moment = datetime.fromisoformat(when.strip())
        except ValueError:
            raise ValueError(f"{where}: TIMESTAMP '{when}' is not a date and time") from None
        at_s = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        yield _Row(at_s, _count(prompt, f"{where}: ContextTokens"), _count(out, f"{where}: GeneratedTokens"))


def _mooncake_rows(file: TextIO) -> Iterator[_Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            record = json.loads(line)
        except ValueError:
            raise ValueError(f"{where} is not JSON") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where} is not a JSON object")
        blocks = record.get("hash_ids")
        if not isinstance(blocks, list) or not all(type(block) is int for block in blocks):
            raise ValueError(f"{where}: hash_ids is not a list of whole numbers")
        yield _Row(
            _count(record.get("timestamp"), f"{where}: timestamp", 1 << 53) / 1000,
            _count(record.get("input_length"), f"{where}: input_length"),
            _count(record.get("output_length"), f"{where}: output_length"),
            tuple(blocks),
        )


def _count(value: Any, where: str, high: int = MAX_TOKENS) -> int:
    """A number that a file holds. Bools are none, and texts only where they are digits."""
    try:
        number = int(value) if isinstance(value, str) or type(value) is int else -1
    except ValueError:
        number = -1
    if not 0 <= number <= high:
        raise ValueError(f"{where} is {value!r}, not a whole number from 0 to {high}")
    return number
