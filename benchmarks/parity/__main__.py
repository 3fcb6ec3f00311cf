"""Greedy parity: python -m benchmarks.parity"""

from __future__ import annotations

import sys

from benchmarks.parity.greedy import main

if __name__ == "__main__":
    sys.exit(main())
