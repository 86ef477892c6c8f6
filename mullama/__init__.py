"""mullama: a local LLM server on llama.cpp whose every decision is visible and replaceable.

    from mullama import Engine

``import mullama`` is cheap: the compiled core is loaded when the first name that needs it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mullama.installation import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from mullama.api import Engine
    from mullama.types import Delta, Finish, GenerateOptions, Profile, Request, SamplingParams

_LAZY = {
    "Engine": "mullama.api",
    "GenerateOptions": "mullama.types",
    "Delta": "mullama.types",
    "Finish": "mullama.types",
    "Profile": "mullama.types",
    "Request": "mullama.types",
    "SamplingParams": "mullama.types",
}

__all__ = ["Delta", "Engine", "Finish", "GenerateOptions", "Profile", "Request", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mullama' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
