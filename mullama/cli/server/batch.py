"""``mullama batch``: a file of requests, answered by a server while nobody waits for their lines."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from mullama.cli.options import echo_json, json_option
from mullama.cli.progress import StepProgress
from mullama.cli.remote import RemoteError, Server, server_options
from mullama.files import STDIO

ENDPOINT = "/v1/chat/completions"
LOOK_S = 0.5  # between two looks at a batch
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")


@click.command(short_help="Let a server answer a file of requests.")
@click.argument("file", metavar="FILE|ID")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), default=STDIO, metavar="FILE", help="Answers; default: stdout."
)
@click.option("--errors", type=click.Path(path_type=Path), metavar="FILE", help="What failed; default: only counted.")
@click.option("--endpoint", metavar="PATH", help=f"Where the requests go; default: the first one's, else {ENDPOINT}.")
@click.option("--window", default="24h", metavar="DURATION", help="How long it may take; default: 24h.")
@click.option("--detach", is_flag=True, help="Print the batch's id and do not wait.")
@server_options
@json_option
def command(
    file: str,
    output: Path,
    errors: Path | None,
    endpoint: str | None,
    window: str,
    detach: bool,
    url: str,
    key: str,
    as_json: bool,
) -> None:
    """Upload FILE (JSON lines, as OpenAI's batches have them), wait for the answers, and write them.

    Ctrl-C leaves the batch to the server; `mullama batch ID` waits for it again. The server must be running. --json
    prints the batch instead of a summary.
    """
    server = Server(url, key)
    if file.startswith("batch_") and not Path(file).exists():
        batch = server.get(f"/v1/batches/{file}")
    else:
        batch = _begin(server, Path(file), endpoint, window)
    if detach:
        _tell(batch, as_json=as_json)
        return
    batch = _wait(server, batch)
    for name, path in (("output_file_id", output), ("error_file_id", errors)):
        if batch[name] is not None and path is not None:
            server.download(f"/v1/files/{batch[name]}/content", path)
    _tell(batch, as_json=as_json)
    if batch["status"] != "completed":
        told = "; ".join(str(one["message"]) for one in (batch["errors"] or {"data": []})["data"])
        raise RemoteError(f"the batch is {batch['status']}{told and ': '}{told}")


def _begin(server: Server, path: Path, endpoint: str | None, window: str) -> dict[str, Any]:
    data = sys.stdin.buffer.read() if path == STDIO else path.read_bytes()
    file = server.upload("/v1/files", path.name, data, {"purpose": "batch"})
    body = {"input_file_id": file["id"], "endpoint": endpoint or _endpoint_of(data), "completion_window": window}
    return server.post("/v1/batches", body)


def _endpoint_of(data: bytes) -> str:
    import msgspec

    try:
        found: Any = msgspec.json.decode(data.lstrip().partition(b"\n")[0])
        return str(found["url"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return ENDPOINT  # the server says what is wrong with the file


def _wait(server: Server, batch: dict[str, Any]) -> dict[str, Any]:
    try:
        with StepProgress(batch["id"]) as progress:
            while batch["status"] in UNFINISHED:
                counts = batch["request_counts"]
                progress.update(batch["status"], counts["completed"] + counts["failed"], counts["total"] or None)
                time.sleep(LOOK_S)
                batch = server.get(f"/v1/batches/{batch['id']}")
    except KeyboardInterrupt:
        click.echo(f"it goes on; wait for it with: mullama batch {batch['id']}", err=True)
        raise
    return batch


def _tell(batch: dict[str, Any], *, as_json: bool) -> None:
    """On stderr, but for JSON: stdout may have the answers."""
    if as_json:
        echo_json(batch)
        return
    counts = batch["request_counts"]
    words = f"{counts['completed']} answered, {counts['failed']} failed of {counts['total']}"
    click.echo(f"{batch['id']}: {batch['status']}, {words}", err=True)
