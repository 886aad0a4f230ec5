"""python -m rave_dispatcher."""

from __future__ import annotations

import sys

from rave_dispatcher.main import main

if __name__ == "__main__":
    sys.exit(main())
