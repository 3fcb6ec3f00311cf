"""Structured generation: python -m benchmarks.structured"""

from __future__ import annotations

from benchmarks.structured.run import main

if __name__ == "__main__":
    main()
