from collections.abc import Iterable

from mullama._core.parking import Parking

class Core(Parking):
    def run(
        self,
        decode: Iterable[int],
        prefill: Iterable[tuple[int, int]],
        max_steps: int = 0,
        until_ns: int = 0,
    ) -> bool: ...
