"""Tests. Everything that they start runs its tensors on one thread, unless the environment says otherwise.

On two cores and on nano's small tensors, two OpenMP threads in each of several processes mostly wait for each other.
"""

import os

# Here, as torch reads it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
