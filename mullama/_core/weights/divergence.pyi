from collections.abc import Callable, Sequence

from mullama._core.model.context import Context

class Divergence:
    def __init__(self, old: Context, new: Context) -> None: ...
    def measure(
        self,
        tokens: Sequence[int],
        n_tail: int,
        *,
        carry: bool = False,
        goes_on: Callable[[], bool] | None = None,
    ) -> tuple[list[float], int] | None: ...
