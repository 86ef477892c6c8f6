"""Ways of computing products of weights, and quantising: what changes or reads weights by their types."""

from mullama._core.kernels.products import (
    COUNTED,
    KERNELS,
    N_CLASSES,
    Products,
    allow_layout,
    check_attention,
    counts,
    has_attention,
    layouts,
    set_attention,
    set_kernel,
    weights_by_layout,
)

__all__ = [
    "COUNTED",
    "KERNELS",
    "N_CLASSES",
    "Products",
    "allow_layout",
    "check_attention",
    "counts",
    "has_attention",
    "layouts",
    "set_attention",
    "set_kernel",
    "weights_by_layout",
]
