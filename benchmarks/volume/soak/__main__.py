"""The soak: python -m benchmarks.volume.soak"""

from __future__ import annotations

import sys

from benchmarks.volume.soak.run import main

if __name__ == "__main__":
    sys.exit(main())
