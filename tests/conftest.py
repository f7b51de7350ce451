"""For all tests: runs are not added to the history of whoever runs the tests, and the processor computes.

Tests of a GPU name it.
"""

from __future__ import annotations

import os

os.environ["HEADRACE_HISTORY"] = ""
os.environ["HEADRACE_DEVICE"] = "cpu"
