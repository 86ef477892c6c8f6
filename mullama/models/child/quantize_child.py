"""The process that quantises: ``python -m mullama.models.child.quantize_child SOURCE TARGET TYPE THREADS [IMATRIX]``.

llama.cpp reports a line a tensor on stderr, which the parent reads as progress; the result is a JSON line on stdout.
It has no way to stop: the parent kills this process.
"""

from __future__ import annotations

import json
import sys

from mullama.child import become_child, yield_to_other_sessions

#: Some 3 % of a core beside busy ones: running streams keep nine tenths of their speed.
NICE = 15


def main(source: str, target: str, ftype: str, n_threads: int, imatrix: str = "") -> int:
    become_child(niceness=NICE)
    yield_to_other_sessions(NICE)
    from mullama.errors import MullamaError

    try:
        from mullama._core import quantize, set_log_level
        from mullama.models.files.imatrix import read_imatrix

        matrix = read_imatrix(imatrix) if imatrix else None
        set_log_level("info")
        size = quantize(source, target, ftype, n_threads=n_threads, imatrix=matrix)
        print(json.dumps({"ok": True, "size": size}), flush=True)
    except MullamaError as error:
        print(json.dumps({"ok": False, "reason": error.message}), flush=True)
    except MemoryError:
        print(json.dumps({"ok": False, "reason": "out of memory"}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), *sys.argv[5:6]))
