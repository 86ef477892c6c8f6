from typing import Any

POLICIES: tuple[str, ...]

class Arbiter:
    policy: str
    @property
    def contended(self) -> bool: ...
    def set_share(self, seat: int, *, weight: float = 1.0, priority: int = 0) -> None: ...
    def seats(self) -> dict[int, dict[str, Any]]: ...

arbiter: Arbiter
