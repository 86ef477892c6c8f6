"""``mullama show``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from mullama.cli.options import echo_json, json_option

if TYPE_CHECKING:
    from pathlib import Path

    from mullama.models.gguf import Header

TEMPLATE_KEY = "tokenizer.chat_template"


@click.command(short_help="Show what a model file says of itself.")
@click.argument("reference")
@click.option("--template", "only_template", is_flag=True, help="Print only the chat template.")
@json_option
def command(reference: str, only_template: bool, as_json: bool) -> None:
    """Show sizes, metadata and chat template of a model in the store or of a local file."""
    from mullama.models import gguf
    from mullama.models.reference import parse_spec
    from mullama.models.store import Store

    store = Store()
    spec = parse_spec(reference, store.lookup)
    path = store.resolve(spec.reference)
    entry = None if spec.reference.is_local else store.find(spec.reference.key)
    header = gguf.check(path)
    size = header.file_size
    if only_template:
        _print_template(header)
        return
    facts = {
        "name": spec.served_name(entry.filename if entry else path.name),
        "reference": spec.reference.text,
        "path": str(path),
        "size": size,
        "sha256": entry.sha256 if entry else _hash(path, size),
        "license": (entry and entry.license) or header.get("general.license"),
        "pulled_at": entry.pulled_at if entry else None,
        **_summary(header),
    }
    if as_json:
        metadata = {key: _jsonable(value) for key, value in header.metadata.items()}
        echo_json({**facts, "metadata": metadata, "chat_template": header.get(TEMPLATE_KEY)})
    else:
        _print(facts, header)


def _hash(path: Path, size: int) -> str:
    from mullama.cli.progress import HashProgress
    from mullama.models.store import hash_file

    with HashProgress(path.name) as progress:
        return hash_file(path, lambda done: progress("hashing", done, size))


def _summary(header: Header) -> dict[str, Any]:
    """What most people look for, under names of ours."""
    vocabulary = header.get("tokenizer.ggml.tokens")
    return {
        "gguf_version": header.version,
        "architecture": header.get("general.architecture"),
        "parameters": header.n_params,
        "context_length": header.get("{arch}.context_length"),
        "layers": header.get("{arch}.block_count"),
        "embedding_length": header.get("{arch}.embedding_length"),
        "vocabulary": getattr(vocabulary, "count", None),
        "tensors": dict(Counter(tensor.type for tensor in header.tensors).most_common()),
    }


def _print(facts: dict[str, Any], header: Header) -> None:
    from mullama.cli.table import human_size, printable

    shown = {
        **facts,
        "size": f"{human_size(facts['size'])} ({facts['size']} bytes)",
        "parameters": f"{facts['parameters'] / 1e6:.1f} million",
        "tensors": ", ".join(f"{count} × {kind}" for kind, count in facts["tensors"].items()),
    }
    for name, value in shown.items():
        if value is not None:
            click.echo(f"{name.replace('_', ' '):<18}{printable(str(value))}")
    click.echo("\nmetadata")
    for key, value in header.metadata.items():
        if key != TEMPLATE_KEY:
            click.echo(f"  {printable(key)} = {printable(_short(value))}")
    click.echo("\nchat template")
    _print_template(header)


def _print_template(header: Header) -> None:
    from mullama.cli.table import printable

    template = header.get(TEMPLATE_KEY)
    if isinstance(template, str):
        click.echo(printable(template))
    else:
        click.echo("the file has no chat template; ChatML is used", err=True)


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 160 else text[:157] + "…"


def _jsonable(value: Any) -> Any:
    from mullama.models.gguf import Summary

    if isinstance(value, Summary):
        return {"type": value.type, "count": value.count, "head": [_jsonable(item) for item in value.head]}
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)  # JSON has no such numbers
    return value
