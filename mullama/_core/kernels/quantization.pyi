from collections.abc import Mapping
from os import PathLike

FTYPES: dict[str, int]

def quantize_types() -> list[str]: ...
def quantize(
    src: str | PathLike[str],
    dst: str | PathLike[str],
    ftype: str,
    *,
    n_threads: int = 1,
    imatrix: Mapping[str, bytes | bytearray | memoryview] | None = None,
    allow_requantize: bool = True,
    only_copy: bool = False,
) -> int: ...
