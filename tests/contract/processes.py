"""Scripts in processes of their own, where SGLang is as installed: in this one, tests replace functions of SGLang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def output_of(module: str, *arguments: str, **environment: str) -> Any:
    """What a module prints last when it is run, decoded from JSON."""
    command = [sys.executable, "-m", module, *arguments]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.strip().splitlines()[-1])
