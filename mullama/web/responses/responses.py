"""``/v1/responses``: asking, and what is kept of the answers."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import falcon.asgi
import msgspec
import orjson

from mullama.errors import InvalidRequest, NotFound
from mullama.serving.durations import parse_duration
from mullama.web.error_responses import as_mullama_error
from mullama.web.http.request import PERMIT, Request
from mullama.web.keys.rate_limits import Permit
from mullama.web.openai.chat_completions import count_tokens, open_chat
from mullama.web.openai.opening import Opened, in_words_of
from mullama.web.openai.pages import PAGING, page_of
from mullama.web.openai.responding import deliver, wants_profile
from mullama.web.openai.schemas import ChatCall
from mullama.web.openapi.answer_types import DeletedObject, ListPage, ResponseObject, ResponseTokens
from mullama.web.openapi.operation import PROFILE, Operation, Parameter
from mullama.web.responses.response_bodies import NAMES, Item, ResponseBody, chat_of, items_of, parse_response
from mullama.web.responses.response_events import ResponseEvents, ResponseWriter
from mullama.web.responses.response_store import ResponseStore, Stored, cancel, history
from mullama.web.security import Access
from mullama.web.services import LARGE_BODY, Services
from mullama.web.stream.event_stream import EVENTS
from mullama.web.stream.generations import Reply


class _Route:
    access = Access.CLIENT

    def __init__(self, services: Services, store: ResponseStore) -> None:
        self._services = services
        self._store = store

    async def _asked(self, req: Request) -> tuple[ResponseBody, ChatCall]:
        """Raises InvalidRequest, ModelNotFound, PayloadTooLarge, ResponseNotFound."""
        services, tenant = self._services, req.tenant
        body, size = await services.parse(req, lambda data: (parse_response(data), len(data)))
        chain = self._store.chain(body.previous_response_id, tenant) if body.previous_response_id else []
        is_large = sum(one.n_bytes for one in chain) + size > LARGE_BODY
        with in_words_of(NAMES):
            call = await services.offload(is_large, lambda: chat_of(body, history(chain), services.models), req)
        return body, call


class Responses(_Route):
    operations = {
        "POST": Operation(
            "Answer items, or go on with an answer",
            body=ResponseBody,
            answer=ResponseObject,
            streams=EVENTS,
            parameters=(PROFILE,),
        )
    }

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Raises InvalidRequest, ModelNotFound, PayloadTooLarge, ResponseNotFound, and what the engine raises."""
        services, store = self._services, self._store
        body, call = await self._asked(req)
        if body.background and not store.max_bytes:
            words = "background: this server stores no responses (--response-store-bytes 0)"
            raise InvalidRequest(words, param="background")
        is_stored = body.store is not False and store.max_bytes > 0
        with in_words_of(NAMES):
            opened = await open_chat(services, req, call, endpoint="responses", id_prefix="resp_")
        writer = ResponseWriter(body, opened, is_stored=is_stored, with_profile=wants_profile(req))
        items = msgspec.json.encode(items_of(body))
        one = Stored(writer.id, req.tenant, body.previous_response_id, items, b"", "in_progress")

        def keep(response: dict[str, Any]) -> None:
            one.data, one.status = orjson.dumps(response), response["status"]
            if is_stored:
                store.put(one)

        if body.background:
            one.group = opened.group
            keep(writer.begun())
            resp.data = one.data
            permit = req.scope.pop(PERMIT, None)  # it lasts as long as the generation
            services.keep(asyncio.get_running_loop().create_task(self._run(one, opened, writer, permit)))
            return

        def whole(replies: list[Reply]) -> dict[str, Any]:
            response = writer.ended(replies[0].content, replies[0].finish)
            keep(response)
            return response

        chunks = partial(ResponseEvents, writer, keep)
        await deliver(req, resp, services, opened, streams=opened.options.stream, chunks=chunks, whole=whole)

    async def _run(self, one: Stored, opened: Opened, writer: ResponseWriter, permit: Permit | None) -> None:
        """Generate for nobody who waits."""
        try:
            (reply,) = await opened.group.collect()
            response = writer.ended(reply.content, reply.finish)
        except Exception as error:  # logged by as_mullama_error, and told to who asks for the response
            response = writer.failed(as_mullama_error(error), is_cancelled=one.is_cancelled)
        finally:
            opened.group.close()
            if permit is not None:
                permit.release()
        is_wanted, one.group = self._store.is_kept(one), None
        one.data, one.status = orjson.dumps(response), response["status"]
        if is_wanted:
            self._store.put(one)


class OneResponse(_Route):
    operations = {
        "GET": Operation(
            "A stored response",
            answer=ResponseObject,
            parameters=(Parameter("stream", "not there yet: true is refused", {"enum": ["false", "0"]}),),
        ),
        "DELETE": Operation("Forget a stored response", answer=DeletedObject),
    }

    async def on_get(self, req: Request, resp: falcon.asgi.Response, response_id: str) -> None:
        """Raises ResponseNotFound, InvalidRequest for a stream."""
        if req.flag("stream"):
            raise InvalidRequest("stream: this server does not replay the events of a response yet", param="stream")
        resp.data = self._store.get(response_id, req.tenant).data

    async def on_delete(self, req: Request, resp: falcon.asgi.Response, response_id: str) -> None:
        """Raises ResponseNotFound."""
        self._store.delete(response_id, req.tenant)
        resp.data = orjson.dumps({"id": response_id, "object": "response", "deleted": True})


class CancelResponse(_Route):
    counts = False  # as a request of a limited key: what it ends may be all that the key may have
    operations = {"POST": Operation("Stop a response that runs in the background", answer=ResponseObject)}

    async def on_post(self, req: Request, resp: falcon.asgi.Response, response_id: str) -> None:
        """Stop one that runs in the background; one that has ended stays what it is. Raises ResponseNotFound,
        InvalidRequest."""
        one = self._store.get(response_id, req.tenant)
        response = orjson.loads(one.data)
        if not response["background"]:
            raise InvalidRequest(
                "only a response with background=true can be cancelled; leave the connection", param="id"
            )
        if one.group is not None:
            cancel(one)
            response |= {"status": "cancelled"}
        resp.data = orjson.dumps(response)


class InputItems(_Route):
    operations = {"GET": Operation("What a stored response answered", answer=ListPage, parameters=PAGING)}

    async def on_get(self, req: Request, resp: falcon.asgi.Response, response_id: str) -> None:
        """What was asked, with what led to it. Raises ResponseNotFound, InvalidRequest."""
        chain = self._store.chain(response_id, req.tenant)
        size = sum(one.n_bytes for one in chain)
        items = await self._services.offload(size > LARGE_BODY, lambda: _listed(chain), req)
        resp.data = orjson.dumps(page_of(req, items))


def _listed(chain: list[Stored]) -> list[dict[str, Any]]:
    """The items before the last answer."""
    *before, last = chain
    return [item.listed() for item in (*history(before), *msgspec.json.decode(last.items, type=list[Item]))]


class Compact(_Route):
    operations = {"POST": Operation("Not there yet: 404")}

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """Raises NotFound."""
        raise NotFound("this server does not compact conversations yet; truncation 'auto' drops what does not fit")


class InputTokens(_Route):
    operations = {"POST": Operation("Count the tokens of a prompt", body=ResponseBody, answer=ResponseTokens)}

    async def on_post(self, req: Request, resp: falcon.asgi.Response) -> None:
        """How many tokens the prompt of a response has. Raises as ``Responses`` does."""
        _, call = await self._asked(req)
        n_tokens = await count_tokens(self._services, req, call)
        resp.data = orjson.dumps({"object": "response.input_tokens", "input_tokens": n_tokens})


def store_of(services: Services) -> ResponseStore:
    """Raises InvalidRequest for a duration that is none."""
    config = services.config
    return ResponseStore(config.response_store_bytes, parse_duration(config.response_ttl, "response_ttl"))
