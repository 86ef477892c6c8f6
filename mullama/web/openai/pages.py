"""OpenAI's lists: a page of them, by ``order``, ``after`` and ``limit``."""

from __future__ import annotations

from typing import Any

from mullama.errors import InvalidRequest
from mullama.web.http.request import Request
from mullama.web.openapi.operation import Parameter

MAX_LISTED = 100

PAGING = (
    Parameter("order", "asc: the oldest first; desc, as without it: the newest", {"enum": ["asc", "desc"]}),
    Parameter("after", "the id behind which the page begins"),
    Parameter("limit", "entries at most; 20 without it", {"type": "integer", "minimum": 1, "maximum": MAX_LISTED}),
)


def page_of(req: Request, oldest_first: list[dict[str, Any]]) -> dict[str, Any]:
    """The page that a request asks for of entries that each have an ``id``. Raises InvalidRequest."""
    order, after, text = (req.get_param(one.name) for one in PAGING)
    if order not in (None, "asc", "desc"):
        raise InvalidRequest("order: it must be asc or desc", param="order")
    if text is not None and not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_LISTED):
        raise InvalidRequest(f"limit: it must be between 1 and {MAX_LISTED}", param="limit")
    entries = oldest_first if order == "asc" else oldest_first[::-1]
    if after is not None:
        at = next((i for i, one in enumerate(entries) if one["id"] == after), None)
        if at is None:
            raise InvalidRequest(f"after: '{after[:80]}' is not in this list", param="after")
        entries = entries[at + 1 :]
    shown = entries[: int(text or 20)]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(entries) > len(shown),
    }
