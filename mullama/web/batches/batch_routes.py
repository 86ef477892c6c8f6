"""``/v1/batches``."""

from __future__ import annotations

from typing import Any, ClassVar

import falcon.asgi
import msgspec
import orjson

from mullama.batches.batch_files import ENDPOINTS
from mullama.batches.batch_runner import BatchRunner
from mullama.errors import InvalidRequest
from mullama.serving.durations import parse_duration
from mullama.web.http.request import Request
from mullama.web.openai.pages import PAGING, page_of
from mullama.web.openai.schemas import METADATA_SCHEMA, check_metadata, decode_body
from mullama.web.openapi.answer_types import BatchObject, ListPage
from mullama.web.openapi.operation import Operation
from mullama.web.security import Access
from mullama.web.services import Services

WINDOW = "24h"


class BatchBody(msgspec.Struct, kw_only=True):
    input_file_id: str | None = None
    endpoint: str | None = None
    completion_window: str = WINDOW
    metadata: dict[str, str] | None = None
    output_expires_after: Any = None

    field_schemas: ClassVar = {
        "endpoint": {"enum": list(ENDPOINTS)},
        "input_file_id": {"type": "string"},
        "completion_window": {"pattern": r"^[0-9]{1,4}[smhd]$"},
        "metadata": METADATA_SCHEMA,
    }
    required_fields: ClassVar = ("input_file_id", "endpoint")


_decoder = msgspec.json.Decoder(BatchBody)


def parse_batch(data: bytes) -> tuple[BatchBody, float]:
    """The body, and the seconds of its window. Raises InvalidRequest."""
    body = decode_body(_decoder, data)
    if body.endpoint not in ENDPOINTS:
        raise InvalidRequest(f"endpoint: it must be one of {', '.join(ENDPOINTS)}", param="endpoint")
    if body.input_file_id is None:
        raise InvalidRequest("input_file_id: it is missing; it must be the id of a file", param="input_file_id")
    seconds = parse_duration(body.completion_window, "completion_window")
    if not 0 < seconds <= 31 * 86400 or body.completion_window[-1:] not in "smhd":
        raise InvalidRequest("completion_window: it must be a time as 24h", param="completion_window")
    check_metadata(body.metadata)
    return body, seconds


class _Route:
    access = Access.CLIENT

    def __init__(self, services: Services, batches: BatchRunner) -> None:
        self._services = services
        self._batches = batches


class Batches(_Route):
    operations = {
        "GET": Operation("Batches", answer=ListPage, parameters=PAGING),
        "POST": Operation("Answer the requests of an uploaded file", body=BatchBody, answer=BatchObject),
    }

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Raises InvalidRequest, FilesError."""
        found = await self._batches.of_tenant(req.tenant) if self._batches.store.is_there else []
        resp.data = orjson.dumps(page_of(req, [one.shown() for one in found]))

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Raises InvalidRequest, NotFound, QueueFull, FilesError."""
        body, seconds = await self._services.parse(req, parse_batch)
        assert body.endpoint is not None and body.input_file_id is not None
        batch = await self._batches.create(
            req.tenant,
            body.endpoint,
            body.input_file_id,
            window=body.completion_window,
            window_s=seconds,
            metadata=body.metadata,
        )
        resp.data = orjson.dumps(batch.shown())


class OneBatch(_Route):
    operations = {"GET": Operation("One batch", answer=BatchObject)}

    async def on_get(self, req: Request, resp: falcon.asgi.Response, batch_id: str) -> None:
        """Raises NotFound, FilesError."""
        resp.data = orjson.dumps((await self._batches.get(batch_id, req.tenant)).shown())


class CancelBatch(_Route):
    counts = False  # as for a response
    operations = {"POST": Operation("End a batch; what is answered is kept", answer=BatchObject)}

    async def on_post(self, req: Request, resp: falcon.asgi.Response, batch_id: str) -> None:
        """Raises NotFound, InvalidRequest, FilesError."""
        resp.data = orjson.dumps((await self._batches.cancel(batch_id, req.tenant)).shown())
