from typing import Any

from mullama._core.model.model import Model

class Context:
    model: Model
    n_slots: int
    n_ctx: int
    n_batch: int
    embeds: bool
    ranks: bool
    reference: bool
    unified: bool
    can_shift: bool
    needs_checkpoint: bool
    token_bytes: int
    def __init__(
        self,
        model: Model,
        *,
        n_slots: int,
        n_ctx: int,
        n_batch: int = 512,
        flash_attn: str = "auto",
        type_k: str = "f16",
        type_v: str = "f16",
        unified_cells: int = 0,
        reference: bool = False,
        embeds: bool = False,
        ranks: bool = False,
    ) -> None: ...
    def close(self) -> None: ...
    def like(self, model: Model) -> Context: ...
    def buffers(self) -> list[tuple[str, str, int, int]]: ...
    def cell_bytes(self) -> dict[str, int]: ...
    def memory(self) -> dict[str, Any]: ...
