"""``/v1/files``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import falcon
import falcon.asgi
import msgspec
import orjson

from mullama.batches.file_store import FileStore, StoredFile, Upload
from mullama.errors import InvalidRequest, PayloadTooLarge, UnsupportedMediaType
from mullama.files import human_size
from mullama.web.http.request import Request
from mullama.web.openai.pages import PAGING, page_of
from mullama.web.openapi.answer_types import DeletedObject, FileObject, ListPage
from mullama.web.openapi.operation import Operation, Parameter
from mullama.web.security import Access

MAX_FILE = 200_000_000  # bytes, as OpenAI has it for batches
PIECE = 1 << 20  # bytes written or read at a time, in a thread
PURPOSES = ("batch", "batch_output")


class UploadForm(msgspec.Struct):
    purpose: Literal["batch"]
    file: Any

    field_schemas: ClassVar = {"file": {"contentMediaType": "application/octet-stream"}}


class _Route:
    access = Access.CLIENT

    def __init__(self, files: FileStore) -> None:
        self._files = files


class Files(_Route):
    operations = {
        "GET": Operation(
            "Uploaded files, and those of batches",
            answer=ListPage,
            parameters=(*PAGING, Parameter("purpose", "only files of it", {"enum": list(PURPOSES)})),
        ),
        "POST": Operation("Upload a file", body=UploadForm, answer=FileObject, takes=falcon.MEDIA_MULTIPART),
    }

    async def on_get(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Raises InvalidRequest, FilesError."""
        purpose = req.get_param("purpose")
        if purpose not in (None, *PURPOSES):
            raise InvalidRequest(f"purpose: it must be one of {', '.join(PURPOSES)}", param="purpose")
        files = await asyncio.to_thread(self._files.of_tenant, req.tenant) if self._files.is_there else []
        found = [one.shown() for one in files if purpose in (None, one.purpose)]
        resp.data = orjson.dumps(page_of(req, found))

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Raises InvalidRequest, PayloadTooLarge, UnsupportedMediaType, FilesError, FilesFull."""
        if not (req.content_type or "").lower().startswith(falcon.MEDIA_MULTIPART):
            raise UnsupportedMediaType("a file is uploaded as multipart/form-data")
        if (req.content_length or 0) > MAX_FILE:
            raise PayloadTooLarge(f"a file has at most {human_size(MAX_FILE)}")
        upload = await asyncio.to_thread(self._files.upload, req.tenant)
        with upload:
            one = await self._read(req, upload)
        resp.data = orjson.dumps(one.shown())

    async def _read(self, req: Request, upload: Upload) -> StoredFile:
        purpose, filename = "", None
        form: Any = await req.get_media()
        async for part in form:
            if part.name == "purpose":
                purpose = (await part.stream.read(80)).decode("utf-8", "replace")
            elif part.name == "file":
                filename = part.filename or "upload"
                while data := await part.stream.read(PIECE):
                    if upload.n_bytes + len(data) > MAX_FILE:
                        raise PayloadTooLarge(f"a file has at most {human_size(MAX_FILE)}")
                    await asyncio.to_thread(upload.write, data)
        if filename is None:
            raise InvalidRequest("file: it is missing; the form must have a part of this name", param="file")
        if purpose != "batch":
            raise InvalidRequest("purpose: it must be 'batch'; files have no other use here", param="purpose")
        return await asyncio.to_thread(upload.keep, filename[:255], purpose)


class OneFile(_Route):
    operations = {
        "GET": Operation("One file, without what it holds", answer=FileObject),
        "DELETE": Operation("Delete a file", answer=DeletedObject),
    }

    async def on_get(self, req: Request, resp: falcon.asgi.Response, file_id: str) -> None:
        """Raises NotFound, FilesError."""
        resp.data = orjson.dumps((await _one(self._files, file_id, req)).shown())

    async def on_delete(self, req: Request, resp: falcon.asgi.Response, file_id: str) -> None:
        """Raises NotFound, FilesError."""
        await asyncio.to_thread(self._files.delete, file_id, req.tenant)
        resp.data = orjson.dumps({"id": file_id, "object": "file", "deleted": True})


class FileContent(_Route):
    operations = {"GET": Operation("What a file holds", answer="application/octet-stream")}

    async def on_get(self, req: Request, resp: falcon.asgi.Response, file_id: str) -> None:
        """Raises NotFound, FilesError."""
        one = await _one(self._files, file_id, req)
        resp.content_type = "application/octet-stream"
        resp.set_stream(_pieces(self._files.path_of(one)), one.bytes)


async def _one(files: FileStore, file_id: str, req: Request) -> StoredFile:
    return await asyncio.to_thread(files.get, file_id, req.tenant)


async def _pieces(path: Path) -> AsyncIterator[bytes]:
    file = await asyncio.to_thread(path.open, "rb")
    with file:
        while data := await asyncio.to_thread(file.read, PIECE):
            yield data
