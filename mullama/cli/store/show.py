"""``mullama show``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mullama.cli.options import Size, echo_json, json_option

if TYPE_CHECKING:
    from mullama.models.files.gguf import Header
    from mullama.models.store.entry import Entry

TEMPLATE_KEY = "tokenizer.chat_template"


@click.command(short_help="Show what a model file says of itself.")
@click.argument("reference")
@click.option("--template", "only_template", is_flag=True, help="Print only the chat template.")
@click.option("--quant", metavar="QUANT", help="The variant in this quantisation.")
@click.option("--ctx", "n_ctx", type=Size(1, 1 << 24), metavar="N", help="Estimate memory at this context.")
@json_option
def command(reference: str, only_template: bool, quant: str | None, n_ctx: int | None, as_json: bool) -> None:
    """Show sizes, metadata, variants and chat template of a model in the store or of a local file."""
    from mullama.models.files import gguf
    from mullama.models.parse import parse_spec
    from mullama.models.resolve import in_quant
    from mullama.models.sources.selection import quant_of
    from mullama.models.store.store import Store

    store = Store()
    spec = parse_spec(reference, store.lookup)
    if quant:
        spec = in_quant(reference, spec, quant, store)
    path = store.resolve(spec.reference)
    entry = None if spec.reference.is_local else store.find(spec.reference.key)
    header = gguf.check(path)
    if only_template:
        _print_template(header)
        return
    facts = {
        "name": spec.served_name(entry.filename if entry else path.name),
        "reference": spec.reference.text,
        "path": str(path),
        "files": [str(part) for part in gguf.part_paths(path)] if header.n_parts > 1 else None,
        "size": header.file_size,
        "quant": entry.quant if entry else quant_of(path.name),
        "sha256": entry.sha256 if entry else _hash(path, header.file_size),
        "revision": entry.revision if entry else None,
        "variant_of": entry.variant_of if entry else None,
        "variants": {e.key: e.quant for e in store.variants(entry.key)} or None if entry else None,
        "defaults": entry.defaults or None if entry else None,
        "license": (entry and entry.license) or header.get("general.license"),
        "pulled_at": entry.pulled_at if entry else None,
        **_summary(header),
    }
    needs = None
    if n_ctx is not None:
        from mullama.models.files.estimate import estimate

        needs = estimate(header, n_ctx=n_ctx)
    if as_json:
        if needs is not None:
            facts["memory"] = needs.to_json()
        beside = {"template": entry.template, "system": entry.system} if entry else {}
        echo_json(
            _jsonable({**facts, **beside, "metadata": header.metadata, "chat_template": header.get(TEMPLATE_KEY)})
        )
    else:
        _print(facts, header)
        _print_beside(entry)
        if needs is not None:
            from mullama.cli.store.fit import print_estimate

            click.echo(f"\nmemory of one request of {needs.n_ctx} tokens (mullama fit says how many fit)")
            print_estimate(needs)


def _hash(path: Path, size: int) -> str:
    """The digest of a local model, remembered while the file does not change; of several files that of the set."""
    from mullama.cli.progress import HashProgress
    from mullama.models.files.gguf import part_paths
    from mullama.models.store.digests import digest_of
    from mullama.models.store.entry import set_digest

    with HashProgress(path.name) as progress:
        digests = [digest_of(part, lambda done: progress("hashing", done, size)) for part in part_paths(path)]
    return digests[0] if len(digests) == 1 else set_digest(digests)


def _summary(header: Header) -> dict[str, Any]:
    """What most people look for, under names of ours."""
    from mullama.models.files.kind import kind_of

    return {
        "gguf_version": header.version,
        "architecture": header.get("general.architecture"),
        "kind": kind_of(header),
        "parameters": header.n_params,
        "context_length": header.get("{arch}.context_length"),
        "layers": header.get("{arch}.block_count"),
        "embedding_length": header.get("{arch}.embedding_length"),
        "vocabulary": header.count("tokenizer.ggml.tokens"),
        "tensors": dict(Counter(tensor.type for tensor in header.tensors).most_common()),
    }


def _print(facts: dict[str, Any], header: Header) -> None:
    from mullama.cli.table import printable
    from mullama.files import human_size

    shown = {
        **facts,
        "size": f"{human_size(facts['size'])} ({facts['size']} bytes)",
        "parameters": f"{facts['parameters'] / 1e6:.1f} million",
        "tensors": ", ".join(f"{count} × {kind}" for kind, count in facts["tensors"].items()),
    }
    for name in ("variants", "defaults"):
        if facts[name]:
            shown[name] = ", ".join(f"{key}: {value}" for key, value in facts[name].items())
    if facts["files"]:
        shown["files"] = ", ".join(Path(file).name for file in facts["files"])
    for name, value in shown.items():
        if value is not None:
            click.echo(f"{name.replace('_', ' '):<18}{printable(str(value))}")
    click.echo("\nmetadata")
    for key, value in header.metadata.items():
        if key != TEMPLATE_KEY:
            click.echo(f"  {printable(key)} = {printable(_short(value))}")
    click.echo("\nchat template")
    _print_template(header)


def _print_beside(entry: Entry | None) -> None:
    """What came beside the file."""
    from mullama.cli.table import printable

    beside = {"template that came with it (Ollama's form; not used)": entry.template,
              "system message that came with it": entry.system} if entry is not None else {}  # fmt: skip
    for title, text in beside.items():
        if text:
            click.echo(f"\n{title}\n{printable(text)}")


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
    """The same as JSON can say it. SAFETY: a file may have anything under any key."""
    from mullama.models.files.gguf import Summary

    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, Summary):
        return {"type": value.type, "count": value.count, "head": [_jsonable(item) for item in value.head]}
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)  # JSON has no such numbers
    return value
