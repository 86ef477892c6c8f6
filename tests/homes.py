"""Homes of a test's own (``$MULLAMA_HOME``) that share what is known of this machine's ways of computing; and none.

In a home that knows nothing of them, the first load of every type of weights tries them all: seconds, in each test.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from mullama.home import default_root

_SHARED = default_root() / "kernels"  # before any test sets a home


def home(folder: Path) -> str:
    """Make it; what to set the variable to."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # no links here: then it is found out once more
        _SHARED.mkdir(parents=True, exist_ok=True)
        (folder / "kernels").symlink_to(_SHARED, target_is_directory=True)
    return str(folder)


#: What a container with a user id of no name lacks: the id's entry in the user database, a temporary folder.
_HOMELESS = """
import pwd, sys, tempfile
def nobody(*_):
    raise KeyError("getpwuid(): uid not found: 54321")
def nowhere(*_):
    raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")
pwd.getpwuid = pwd.getpwnam = nobody
tempfile._get_default_tempdir = nowhere
from mullama.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def homeless(folder: Path, *args: str) -> subprocess.Popen[str]:
    """``mullama ARGS`` in ``folder``, without HOME and what else such a container lacks."""
    gone = ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "TMPDIR")
    env = {name: value for name, value in os.environ.items() if name not in gone and not name.startswith("MULLAMA_")}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", _HOMELESS, *args],
        cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
