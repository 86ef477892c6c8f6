"""The process that converts a model to GGUF: ``python -m mullama.models.child.convert_child FOLDER TARGET NAME``.

The result is a JSON line on stdout. What a folder from somewhere else does to the reader (a crash of numpy, all the
memory) it does to this process, which steps back beside running decodes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mullama.child import become_child, yield_to_other_sessions

NICE = 15


def main(folder: str, target: str, name: str) -> int:
    become_child(niceness=NICE)
    yield_to_other_sessions(NICE)
    from mullama.errors import MullamaError
    from mullama.models.converting.bert import convert

    try:
        with Path(target).open("wb") as out:
            convert(Path(folder), out, name=name)
        print(json.dumps({"ok": True}), flush=True)
    except MullamaError as error:
        print(json.dumps({"ok": False, "reason": error.message}), flush=True)
    except (MemoryError, OSError) as error:
        print(json.dumps({"ok": False, "reason": str(error) or "out of memory"}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
