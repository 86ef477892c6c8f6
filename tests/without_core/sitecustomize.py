"""On ``PYTHONPATH`` this folder hides the compiled core from a Python process and from those that it starts."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class CoreHidden(MetaPathFinder, Loader):
    """Whoever imports ``mullama._core`` is told that nothing is compiled."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if f"{name}.".startswith("mullama._core.") else None

    def exec_module(self, module: ModuleType) -> None:
        raise ModuleNotFoundError(f"{module.__name__} is hidden: nothing is compiled here", name=module.__name__)


sys.meta_path.insert(0, CoreHidden())
