"""Where mullama keeps its files, and whose home a ``~`` is."""

from __future__ import annotations

import os
from pathlib import Path

from mullama.errors import ConfigError

HOME_VARIABLE = "MULLAMA_HOME"


#: The root where there is no home, as for a container's user id without a name: nothing is there, and nothing can be.
NOWHERE = Path(os.devnull) / "mullama"


def default_root() -> Path:
    """``$MULLAMA_HOME``, else the platform's cache folder for mullama, else ``NOWHERE``. Raises ConfigError.

    Models that lie elsewhere are served without a home; what must be kept in one asks ``need_home``.
    """
    home = os.environ.get(HOME_VARIABLE)
    if home:
        return expand(home).absolute()
    # Imported here: it costs more than a lookup in the store.
    import platformdirs

    try:
        root = Path(platformdirs.user_cache_dir("mullama", appauthor=False))
    except RuntimeError:  # neither HOME nor the user database knows
        return NOWHERE
    return NOWHERE if root.parts[0] == "~" else root


def need_home(root: Path) -> None:
    """Raises ConfigError, which says what is needed, for the root of nobody."""
    if root == NOWHERE:
        raise ConfigError(
            f"there is no home folder to keep models in, for neither HOME nor the user database has one; set "
            f"{HOME_VARIABLE} to a folder that this user may write to, or name a model's file with --model PATH"
        )


def expand(path: str | Path) -> Path:
    """The path with ``~`` and ``~user`` replaced. Raises ConfigError where nobody knows that home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        who = Path(path).parts[0]
        raise ConfigError(f"'{path}': nobody knows the home that '{who}' means; write the path out") from None
