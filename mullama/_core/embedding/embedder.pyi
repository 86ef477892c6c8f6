from collections.abc import Sequence
from typing import Any

from mullama._core.compute.arbiter import Arbiter
from mullama._core.compute.governor import Governor
from mullama._core.model.context import Context
from mullama._core.model.model import Model
from mullama._core.output.page import Page
from mullama.types import Pooling

class Embedder:
    context: Context
    model: Model
    governor: Governor
    turns: Arbiter
    page: Page
    n_ctx: int
    n_batch: int
    n_slots: int
    n_embd: int
    seat: int
    can_shift: bool
    unified: bool
    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_batch: int = 0,
        ranks: bool = False,
        flash_attn: str = "auto",
        reference: bool = False,
        n_threads: int = 1,
        threads_fixed: bool = False,
        page_path: str | None = None,
        page_needed: bool = True,
        turns: Arbiter | None = None,
        quick: bool = False,
    ) -> None: ...
    def close(self) -> None: ...
    def run(self, prompts: Sequence[tuple[Sequence[int], Pooling, bool]], n_waiting: int = 0) -> list[bytes | None]: ...
    def pause(self) -> None: ...
    def interrupt(self) -> None: ...
    def abort(self) -> None: ...
    def note_opened(self, n: int) -> None: ...
    def note_cancelled(self, n: int) -> None: ...
    def note_idle(self, ns: int, n_waiting: int) -> None: ...
    def memory(self) -> dict[str, Any]: ...
    def inject_nan(self, prompt: int) -> None: ...
