"""``/v1/files`` and ``/v1/batches``: what is kept, for whom, and what becomes of a batch whatever happens meanwhile."""

from __future__ import annotations

import errno
import http.client
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from mullama.batches import batch_runner as runner
from mullama.batches.batch_files import check_lines, finished_lines
from mullama.batches.file_store import FileStore
from mullama.config import ServeConfig
from mullama.errors import FilesError, FilesFull, NotFound

from .conftest import Live
from .fake_engine import FakeEngine

CHAT = "/v1/chat/completions"


def line(name: str, text: str = "hi", **more: Any) -> dict[str, Any]:
    body = {"model": "fake", "messages": [{"role": "user", "content": text}], **more}
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": body}


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


class Asked:
    """A server, and OpenAI's client for it."""

    def __init__(self, server: Live, key: str = "none") -> None:
        self.client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)

    def batch(self, lines: list[dict[str, Any]], **more: Any) -> Any:
        file = self.client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
        return self.client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", **more)

    def wait(self, batch_id: str, *statuses: str) -> Any:
        end = time.monotonic() + 20
        while (found := self.client.batches.retrieve(batch_id)).status not in statuses:
            assert time.monotonic() < end, found
            time.sleep(0.01)
        return found

    def lines(self, file_id: str | None) -> dict[str, Any]:
        if file_id is None:
            return {}
        text = self.client.files.content(file_id).text
        return {one["custom_id"]: one for one in map(json.loads, text.splitlines())}


def test_a_batch_from_its_file_to_its_answers(engine: FakeEngine, live: Callable[..., Live]) -> None:
    asked = Asked(live())
    batch = asked.batch([*(line(f"n{i}") for i in range(20)), line("bad", temperature=9)], metadata={"a": "b"})
    assert batch.status in ("validating", "in_progress")
    done = asked.wait(batch.id, "completed")
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (21, 20, 1)
    assert done.metadata == {"a": "b"} and done.completed_at >= done.in_progress_at >= done.created_at
    answers, errors = asked.lines(done.output_file_id), asked.lines(done.error_file_id)
    assert set(answers) == {f"n{i}" for i in range(20)} and set(errors) == {"bad"}
    response = answers["n3"]["response"]
    assert (response["status_code"], answers["n3"]["error"]) == (200, None)
    assert response["request_id"] and response["body"]["choices"][0]["message"]["content"] == "Hello wörld!"
    assert errors["bad"]["response"]["body"]["error"]["param"] == "temperature"
    assert {request.priority for request in engine.requests} == {2**31 - 1}
    assert [one.id for one in asked.client.batches.list()] == [batch.id]
    files = {one.id: one for one in asked.client.files.list()}
    assert set(files) == {batch.input_file_id, done.output_file_id, done.error_file_id}
    assert files[batch.input_file_id].filename == "in.jsonl"
    assert asked.client.files.retrieve(batch.input_file_id).bytes == len(
        asked.client.files.content(batch.input_file_id).read()
    )
    assert asked.client.files.delete(batch.input_file_id).deleted
    with pytest.raises(openai.NotFoundError):
        asked.client.files.retrieve(batch.input_file_id)


def test_an_interrupted_batch_goes_on_with_the_next_server(
    engine: FakeEngine, config: ServeConfig, live: Callable[..., Live]
) -> None:
    engine.delay = 0.01
    first = live()
    asked = Asked(first)
    batch = asked.batch([line(f"n{i}") for i in range(60)])
    while asked.client.batches.retrieve(batch.id).request_counts.completed < 10:
        time.sleep(0.01)
    first.server.should_exit = True
    first.thread.join(20)
    n_before = len(engine.requests)
    assert n_before < 60
    # A power cut may have left half a line.
    (part,) = Path(config.files_dir).glob("batch_*.output.part")
    whole = part.read_bytes()
    part.write_bytes(whole + b'{"id":"batch_req_1","custom_id":"n59","resp')
    engine.draining, engine.delay = False, 0.0
    asked = Asked(live())
    done = asked.wait(batch.id, "completed")
    assert (done.request_counts.completed, done.request_counts.failed) == (60, 0)
    assert set(asked.lines(done.output_file_id)) == {f"n{i}" for i in range(60)}
    n_written = whole.count(b"\n")
    assert len(engine.requests) - n_before == 60 - n_written  # what was answered is not asked again


def test_a_cancelled_batch_keeps_what_is_answered(engine: FakeEngine, live: Callable[..., Live]) -> None:
    engine.delay = 0.01
    asked = Asked(live())
    batch = asked.batch([line(f"n{i}") for i in range(200)])
    while asked.client.batches.retrieve(batch.id).request_counts.completed < 5:
        time.sleep(0.01)
    assert asked.client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    done = asked.wait(batch.id, "cancelled")
    assert 5 <= done.request_counts.completed < 200
    assert len(asked.lines(done.output_file_id)) == done.request_counts.completed
    assert engine.running == set()
    with pytest.raises(openai.BadRequestError):
        asked.client.batches.cancel(batch.id)


def test_who_asks_now_goes_first(engine: FakeEngine, live: Callable[..., Live]) -> None:
    """A slot stays free of batches, and they wait while others take the slots."""
    engine.delay = 0.02
    server = live()
    asked = Asked(server)
    engine.hang = True
    streams = []
    for _ in range(engine.info.n_parallel - 1):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("POST", CHAT, json.dumps(line("x")["body"]))
        streams.append(connection)
    while len(engine.running) < len(streams):
        time.sleep(0.01)
    engine.hang = False
    batch = asked.batch([line("n0")])
    time.sleep(0.2)
    assert len(engine.requests) == len(streams)  # no line of it
    for connection in streams:
        connection.close()
    asked.wait(batch.id, "completed")
    more = asked.batch([line(f"n{i}") for i in range(30)])
    most = 0
    while asked.client.batches.retrieve(more.id).status != "completed":
        most = max(most, len(engine.running))
    assert 0 < most < engine.info.n_parallel


def test_a_line_that_finds_no_room_comes_again(
    engine: FakeEngine, live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mullama.errors import QueueFull

    monkeypatch.setattr(runner, "RETRY_S", 0.05)
    engine.submit_errors = [QueueFull("full", retry_after=1), QueueFull("full", retry_after=1)]
    asked = Asked(live())
    done = asked.wait(asked.batch([line("a"), line("b")]).id, "completed")
    assert done.request_counts.completed == 2


def test_a_full_disk_holds_a_batch_up_and_loses_nothing(
    engine: FakeEngine, live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    append, n = runner._append, 0

    def full_for_a_while(path: Path, data: bytes) -> None:
        nonlocal n
        n += 1
        if 3 <= n < 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(path, data)

    monkeypatch.setattr(runner, "RETRY_S", 0.05)
    monkeypatch.setattr(runner, "_append", full_for_a_while)
    asked = Asked(live())
    done = asked.wait(asked.batch([line(f"n{i}") for i in range(10)]).id, "completed")
    assert set(asked.lines(done.output_file_id)) == {f"n{i}" for i in range(10)}
    assert len(engine.requests) == 10


def test_a_batch_whose_time_is_over_says_so(engine: FakeEngine, live: Callable[..., Live]) -> None:
    engine.delay = 0.05
    asked = Asked(live())
    file = asked.client.files.create(file=("in.jsonl", jsonl([line(f"n{i}") for i in range(100)])), purpose="batch")
    short: Any = {"completion_window": "1s"}
    batch = asked.client.batches.create(input_file_id=file.id, endpoint=CHAT, **short)
    done = asked.wait(batch.id, "expired")
    errors = asked.lines(done.error_file_id)
    assert done.request_counts.completed + done.request_counts.failed == 100
    assert {one["error"]["code"] for one in errors.values()} == {"batch_expired"}
    assert len(asked.lines(done.output_file_id)) == done.request_counts.completed


@pytest.mark.parametrize(
    ("data", "code", "number"),
    [
        (b"", "empty_file", 0),
        (b"\n\n", "empty_file", 2),
        (b"nonsense\n", "invalid_json_line", 1),
        (b"\xff\n", "invalid_json_line", 1),
        (b"[" * 5000 + b"\n", "invalid_json_line", 1),
        (jsonl([line("a"), line("a")]), "duplicate_custom_id", 2),
        (jsonl([line("a"), {**line("b"), "url": "/v1/completions"}]), "mismatched_endpoint", 2),
        (jsonl([{**line("a"), "method": "GET"}]), "invalid_method", 1),
        (jsonl([{**line("a"), "body": "x"}]), "invalid_json_line", 1),
        (jsonl([line("a", stream=True)]), "invalid_request", 1),
    ],
)
def test_what_is_wrong_with_a_file_is_named(data: bytes, code: str, number: int, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    _, errors = check_lines(path, CHAT)
    assert [(one["code"], one["line"]) for one in errors] == [(code, number)]


def test_a_batch_of_a_wrong_file_fails(live: Callable[..., Live]) -> None:
    asked = Asked(live())
    done = asked.wait(asked.batch([line("a"), line("a")]).id, "failed")
    assert done.errors.data[0].code == "duplicate_custom_id"
    assert (done.output_file_id, done.error_file_id) == (None, None)
    for wrong in ({"endpoint": "/v1/rerank"}, {"input_file_id": "file-1"}, {"completion_window": "0s"}):
        with pytest.raises(openai.APIStatusError) as caught:
            asked.client.batches.create(
                **{"input_file_id": done.input_file_id, "endpoint": CHAT, "completion_window": "24h"} | wrong  # type: ignore[arg-type]
            )
        assert caught.value.status_code in (400, 404)
    with pytest.raises(openai.BadRequestError):
        asked.client.files.create(file=("in.jsonl", b"x"), purpose="fine-tune")


def test_a_tenant_has_none_of_another_s(config: ServeConfig, live: Callable[..., Live], engine: FakeEngine) -> None:
    config.api_key = ["one-key", "two-key"]
    server = live()
    one, two = Asked(server, "one-key"), Asked(server, "two-key")
    done = one.wait(one.batch([line("a")]).id, "completed")
    assert engine.requests[-1].tenant and engine.requests[-1].tenant.startswith("key-")
    for call in (
        lambda: two.client.files.retrieve(done.output_file_id),
        lambda: two.client.files.content(done.output_file_id),
        lambda: two.client.files.delete(done.output_file_id),
        lambda: two.client.batches.retrieve(done.id),
        lambda: two.client.batches.cancel(done.id),
        lambda: two.client.batches.create(input_file_id=done.input_file_id, endpoint=CHAT, completion_window="24h"),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert list(two.client.files.list()) == list(two.client.batches.list()) == []


def test_who_has_no_key_any_more_gets_no_answers(
    config: ServeConfig, live: Callable[..., Live], engine: FakeEngine
) -> None:
    config.api_key = ["one-key", "two-key"]
    first = live()
    engine.delay = 0.01
    asked = Asked(first, "one-key")
    batch = asked.batch([line(f"n{i}") for i in range(100)])
    while asked.client.batches.retrieve(batch.id).request_counts.completed < 3:
        time.sleep(0.01)
    first.server.should_exit = True
    first.thread.join(20)
    engine.draining, n = False, len(engine.requests)
    config.api_key = ["new-key", "two-key"]
    live()
    (file,) = Path(config.files_dir).glob("batch_*.json")
    end = time.monotonic() + 20
    while json.loads(file.read_bytes())["status"] != "completed":
        assert time.monotonic() < end
        time.sleep(0.01)
    assert len(engine.requests) == n


# -- the store


def put(store: FileStore, size: int, tenant: str | None = None) -> str:
    with store.upload(tenant) as upload:
        upload.write(b"x" * size)
        return upload.keep("a", "batch").id


def test_files_keep_within_their_bounds(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "files", 100_000)
    first = put(store, 40_000, "a")
    with pytest.raises(FilesFull):
        put(store, 20_000, "a")  # half is a tenant's
    put(store, 40_000, "b")
    with pytest.raises(FilesFull):
        put(store, 20_000, "c")
    assert store.get(first, "a").bytes == 40_000
    assert [one.name for one in (tmp_path / "files").glob("*.part")] == []
    store.delete(first, "a")
    put(store, 20_000, "c")
    with pytest.raises(NotFound):
        store.get(first, "a")
    store.close()
    again = FileStore(tmp_path / "files", 100_000)
    assert [one.bytes for one in again.of_tenant("c")] == [20_000]
    with pytest.raises(FilesError, match="another server"):
        FileStore(tmp_path / "files", 100_000).open()
    again.close()


def test_a_disk_that_is_full_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path / "files", 100_000)
    kept = put(store, 10)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mullama.batches.file_store.os.fsync", full)
    with pytest.raises(FilesFull, match="the disk is full"):
        put(store, 20)
    monkeypatch.undo()
    assert [one.id for one in store.of_tenant(None)] == [kept]
    assert list((tmp_path / "files").glob("*.part")) == []
    store.close()


def test_a_cut_line_is_taken_off(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b'{"custom_id":"a"}\n{"custom_id":"b"}\n{"custom')
    assert list(finished_lines(path)) == ["a", "b"]
    assert path.read_bytes().endswith(b'"b"}\n')


def test_many_small_files_have_a_bound_too(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "files", 100_000)
    with pytest.raises(FilesFull):
        for _ in range(30):
            put(store, 0)
    assert len(store.of_tenant(None)) == 100_000 // 4096
    store.close()


def test_a_batch_whose_file_is_gone_keeps_what_is_answered(
    engine: FakeEngine, config: ServeConfig, live: Callable[..., Live]
) -> None:
    engine.delay = 0.01
    first = live()
    asked = Asked(first)
    batch = asked.batch([line(f"n{i}") for i in range(100)])
    while asked.client.batches.retrieve(batch.id).request_counts.completed < 3:
        time.sleep(0.01)
    first.server.should_exit = True
    first.thread.join(20)
    for file in Path(config.files_dir).glob(f"{batch.input_file_id}.*"):
        file.unlink()
    engine.draining = False
    asked = Asked(live())
    done = asked.wait(batch.id, "failed")
    assert "there is no file" in done.errors.data[0].message
    assert len(asked.lines(done.output_file_id)) >= 3


def test_old_batches_are_forgotten(live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MAX_FINISHED", 2)
    asked = Asked(live())
    ids = []
    for i in range(4):
        ids.append(asked.batch([line(f"n{i}")]).id)
        asked.wait(ids[-1], "completed")
    assert {one.id for one in asked.client.batches.list()} <= set(ids[1:])
