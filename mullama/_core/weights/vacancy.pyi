from mullama._core.core.core import Core
from mullama._core.model.context import Context

class Vacancy:
    core: Core
    has_left: bool
    is_over: bool
    held_ns: int
    n_bytes: int
    def __init__(self, core: Core) -> None: ...
    def leave(self) -> Context: ...
    def fill(self, context: Context, *, since_ns: int = 0, is_swap: bool = False) -> int: ...
