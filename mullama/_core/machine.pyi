from os import PathLike
from typing import Any

from mullama._core.arbiter import Arbiter
from mullama._core.context import Context
from mullama._core.governor import Governor
from mullama._core.model import Model
from mullama._core.page import Page

TEXT: int
FINISH: int

class Machine:
    context: Context
    model: Model
    turns: Arbiter
    seat: int
    page: Page
    governor: Governor
    n_slots: int
    n_ctx: int
    n_batch: int
    unified: bool
    can_shift: bool
    def __init__(
        self,
        model: Model,
        *,
        n_threads: int = 1,
        threads_fixed: bool = False,
        page_path: str | PathLike[str] | None = None,
        page_needed: bool = True,
        turns: Arbiter | None = None,
        quick: bool = False,
        n_slots: int,
        n_ctx: int,
        n_batch: int = 512,
        flash_attn: str = "auto",
        type_k: str = "f16",
        type_v: str = "f16",
        unified_cells: int = 0,
        reference: bool = False,
    ) -> None: ...
    def close(self) -> None: ...
    def note_plan(self, plan_ns: int, waiting: int, n_decode: int, n_prefill: int) -> None: ...
    def note_idle(self, ns: int, waiting: int) -> None: ...
    def wake_fd(self) -> int: ...
    def drain_records(self, limit: int = 4096) -> list[Any]: ...
    def wake_reader(self) -> None: ...
    def interrupt(self) -> None: ...
    def rearm(self) -> None: ...
    def abort(self) -> None: ...
    def steps_done(self) -> int: ...
    def kv_costs(self) -> dict[str, float]: ...
    def pause(self) -> None: ...
    def counters_dict(self) -> dict[str, int]: ...
    @property
    def is_vacant(self) -> bool: ...
    def memory(self) -> dict[str, Any]: ...
    def staging_bytes(self) -> int: ...
    def ring_usage(self) -> tuple[int, int]: ...
