"""The direct path of streamed text: from the reader's delivery into the connection's buffer, without a task switch.

The ordinary way of a chunk is: a future, a task switch, Falcon's loop over ``resp.stream``, uvicorn's ``send``. It
works with any ASGI server, and everything but the text of a stream that flows always takes it: the headers, pings,
errors, finish reasons, usage, the end. The law of the short cut beside it:

1. A text is written directly only while the ordinary way is asleep, waiting for text, and nothing is queued before this
   text: not in the generation, not between several generations and their stream. So nothing overtakes.
2. Whoever cannot write at once declines: the client is slow (uvicorn's flow control), gone, or its response has not
   begun. A declined text is queued like any other, which wakes the ordinary way; that one waits for the client while
   the generation merges. So nothing is lost, and a slow reader costs a bounded buffer.
3. The bytes are those uvicorn would have written. A reader cannot tell the paths apart.

The door is an ASGI extension that ``Protocol`` puts into the scope. Where there is none (another server, a test's
transport), every chunk goes the ordinary way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeGuard

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from mullama.types import TokenScore

EXTENSION = "mullama.direct_body"

#: Takes a text that has just become final, with its tokens where they are asked for, on the event loop. False: it was
#: not taken and must be queued.
Sink = Callable[[str, Sequence[TokenScore]], bool]


class Diverting(Protocol):
    """A generation that offers each text to ``sink`` before it queues it, unless it has queued another one."""

    sink: Sink | None


def diverts(generation: object) -> TypeGuard[Diverting]:
    """PERF: to ask the protocol itself (``isinstance``) takes as long as parsing a request."""
    return hasattr(generation, "sink")


class DirectBody:
    """The body of the response to one request."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    def writer(self, head: bytes, tail: bytes) -> Callable[[bytes], bool]:
        """A function that sends ``head``, its argument and ``tail`` as one piece of the body, as uvicorn's ``send``
        would, and never waits. What makes it return False, having sent nothing, is in the law's second point.

        PERF: a closure. Between two tokens the compute threads empty the caches, and then every object and every
        function that is touched costs as much as a hundred instructions.
        """
        cycle = self._cycle
        flow = cycle.flow
        write = cycle.transport.write
        size = len(head) + len(tail)
        end = tail + b"\r\n"

        def send(middle: bytes) -> bool:
            if flow.write_paused or cycle.disconnected or cycle.response_complete or not cycle.chunked_encoding:
                return False
            write(b"%x\r\n%b%b%b" % (size + len(middle), head, middle, end))
            return True

        return send


def direct_body(scope: dict[str, Any]) -> DirectBody | None:
    """The direct way to the client of a request, if its server offers one."""
    body = (scope.get("extensions") or {}).get(EXTENSION, {}).get("body")
    return body if isinstance(body, DirectBody) else None
