"""``mullama embed``: vectors of texts, without a server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from mullama.cli.options import config_from, config_options, echo_json, json_option

DEFAULT_MODEL = "minilm"
#: Of the options of ``serve``, those that mean something here.
CONFIG_OPTIONS = ("allow_private_sources", "ctx_size", "threads", "threads_fixed", "mmap", "gpu_layers", "memory_check")
BATCH = 256  # texts that are computed before their vectors are written


@click.command(short_help="Make vectors of texts; no server needed.")
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option("--with", "named", default=DEFAULT_MODEL, metavar="MODEL", help="The embedding model.", show_default=True)
@click.option("--pooling", type=click.Choice(["mean", "cls", "last"]), help="Other than the model's own.")
@click.option("--cut", is_flag=True, help="Cut texts that are too long, instead of refusing them.")
@config_options(CONFIG_OPTIONS)
@json_option
def command(texts: tuple[str, ...], named: str, pooling: str | None, cut: bool, as_json: bool, **params: Any) -> None:
    """Write the vector of each TEXT, or of each line of a pipe, as a JSON list a line.

    With --json one object: the model, and of each text its tokens and vector.
    """
    import numpy as np
    import orjson

    from mullama.cli.load_progress import find_model, load_any
    from mullama.engine.embedding.cutting import Cut
    from mullama.engine.embedding.embedding_engine import EmbeddingEngine
    from mullama.errors import InvalidRequest
    from mullama.types import EmbeddingRequest, ModelKind, Pooling

    config = config_from(params)
    found = find_model(named, config=config)
    engine = load_any(found, config)
    try:
        if not isinstance(engine, EmbeddingEngine) or engine.info.kind is not ModelKind.EMBED:
            raise InvalidRequest(f"'{found.name}' makes no vectors of texts; choose an embedding model, such as minilm")
        rows = []
        shorten = Cut(engine.info.n_ctx if cut else None)
        for batch in _batches(texts):
            most = None if cut else engine.info.n_ctx
            prompts = [shorten.of(engine.prompt_tokens(text, most=most), *engine.affixes()) for text in batch]
            kind = None if pooling is None else Pooling(pooling)
            vectors = engine.embed_sync(EmbeddingRequest(id="embed", prompts=prompts, pooling=kind))
            for text, prompt, vector in zip(batch, prompts, vectors, strict=True):
                numbers = np.frombuffer(vector, np.float32)
                if as_json:
                    rows.append({"text": text, "tokens": len(prompt), "embedding": numbers.tolist()})
                else:
                    sys.stdout.buffer.write(orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
        if as_json:
            echo_json({"model": found.name, "data": rows})
    finally:
        engine.close()


def _batches(texts: tuple[str, ...]) -> Iterator[list[str]]:
    """The texts, a few at a time: the arguments, else the lines of a pipe. Raises UsageError."""
    if not texts and sys.stdin.isatty():
        raise click.UsageError("there is no TEXT, and no pipe that has one")
    batch: list[str] = []
    for line in texts or sys.stdin:
        batch.append(line if texts else line.rstrip("\r\n"))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
