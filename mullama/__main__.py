"""``python -m mullama``."""

import sys

from mullama.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
