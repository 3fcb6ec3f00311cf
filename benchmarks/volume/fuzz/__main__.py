"""Hostile requests: python -m benchmarks.volume.fuzz"""

from __future__ import annotations

import sys

from benchmarks.volume.fuzz.run import main

if __name__ == "__main__":
    sys.exit(main())
