"""Where mullama keeps its files."""

from __future__ import annotations

import os
from pathlib import Path

HOME_VARIABLE = "MULLAMA_HOME"


def default_root() -> Path:
    """``$MULLAMA_HOME``, else the platform's cache folder for mullama."""
    home = os.environ.get(HOME_VARIABLE)
    if home:
        return Path(home).expanduser().absolute()
    # Imported here: it costs more than a lookup in the store.
    import platformdirs

    return Path(platformdirs.user_cache_dir("mullama", appauthor=False))
