"""The command: see ``tests/fuzz/__init__.py``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import NAMES, ROOT, campaign
from .targets import corpus, load


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("files", nargs="*", type=Path, help="inputs to try once")
    parser.add_argument("--seconds", type=float, default=0.0, help="of processor time, guided by coverage (atheris)")
    parser.add_argument("--work", type=Path, help="folder of the growing corpus and of what was found")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args, more = parser.parse_known_args()
    work = args.work or ROOT / "build" / "fuzzing" / args.name
    if args.child:
        campaign.fuzz(args.name, more)
        return 0
    if more:
        parser.error(f"unknown arguments: {' '.join(more)}")
    if args.seconds:
        return campaign.run(args.name, args.seconds, work)
    target = load(args.name)
    try:
        cases = {str(path): path.read_bytes() for path in args.files} or corpus(args.name)
        for case, data in cases.items():
            print(case, flush=True)  # the last one is what ended the process
            target(data)
    finally:
        target.close()
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
