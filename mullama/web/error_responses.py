"""Every error becomes an error object, OpenAI's or that of the API that was asked: ours, Falcon's own, and those
nobody expected."""

from __future__ import annotations

import logging
from typing import Any

import falcon
import falcon.asgi
import orjson

from mullama.errors import MullamaError, QueueFull, ShuttingDown
from mullama.types import Finish, FinishReason
from mullama.web.http.request import Request

log = logging.getLogger(__name__)

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 415: "unsupported_media_type"}


def add_error_handlers(app: falcon.asgi.App[Any, Any]) -> None:
    # NOTE: Falcon picks the handler of the most specific class.
    app.add_error_handler(Exception, _unexpected)
    app.add_error_handler(falcon.HTTPError, _from_falcon)
    app.add_error_handler(MullamaError, _expected)


def internal_error() -> MullamaError:
    """What a client is told of an error nobody expected."""
    return MullamaError("internal error; the server's log has the details")


def as_mullama_error(error: BaseException) -> MullamaError:
    """The error a client may see. An unexpected one is logged and replaced, so that nothing leaks."""
    if isinstance(error, MullamaError):
        return error
    log.error("unexpected error", exc_info=error)
    return internal_error()


def finish_error(finish: Finish) -> MullamaError | None:
    """The error of a generation that did not end by itself, or None."""
    if finish.reason is FinishReason.ERROR:
        return as_mullama_error(finish.error) if finish.error is not None else internal_error()
    if finish.reason is FinishReason.CANCELLED:
        if isinstance(finish.error, MullamaError):
            return finish.error
        return ShuttingDown("the server cancelled this request, it is shutting down", retry_after=1)
    return None


async def _expected(req: Request, resp: falcon.asgi.Response, error: MullamaError, params: Any) -> None:
    told = error.for_clients if not req.is_operator else None
    if error.status >= 500 or told is not None:
        # That a busy server says so, and one that ends, is what they should do.
        level = logging.INFO if isinstance(error, QueueFull | ShuttingDown) else logging.WARNING
        log.log(level, "%s %s: %s", req.method, req.path, error.message)
    body = error.to_openai()
    if told is not None:
        body["error"]["message"] = told
    _reply(req, resp, error.status, body)
    if error.retry_after is not None or error.status == 503:
        resp.set_header("Retry-After", str(max(1, error.retry_after or 1)))
    if error.status == 401:
        resp.set_header("WWW-Authenticate", "Bearer")


async def _from_falcon(req: Request, resp: falcon.asgi.Response, error: falcon.HTTPError, params: Any) -> None:
    status = error.status_code
    if status == 404:
        message = f"there is no {req.path}"
    elif status == 405:
        message = f"{req.path} does not take {req.method}"
    else:
        message = error.description or error.title or "bad request"
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": _CODES.get(status)}}
    _reply(req, resp, status, body)
    if error.headers:
        resp.set_headers(error.headers)


async def _unexpected(req: Request, resp: falcon.asgi.Response, error: Exception, params: Any) -> None:
    log.error("%s %s failed", req.method, req.path, exc_info=error)
    internal = internal_error()
    _reply(req, resp, internal.status, internal.to_openai())


def _reply(req: Request, resp: falcon.asgi.Response, status: int, body: dict[str, Any]) -> None:
    if req.spell_error is not None:
        body = req.spell_error(status, body["error"])
    resp.status = status
    resp.content_type = falcon.MEDIA_JSON
    resp.stream = None
    resp.data = orjson.dumps(body)
