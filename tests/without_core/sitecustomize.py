"""On ``PYTHONPATH`` this folder hides the compiled core from a Python process and from those that it starts."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class CoreHidden(MetaPathFinder):
    """Refuses ``mullama._core``, as where nothing was compiled."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "mullama._core" or name.startswith("mullama._core."):
            raise ModuleNotFoundError(f"{name} is hidden: nothing is compiled here", name=name)


sys.meta_path.insert(0, CoreHidden())
