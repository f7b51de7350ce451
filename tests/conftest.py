"""For all tests: runs are not added to the history of whoever runs the tests."""

from __future__ import annotations

import os

os.environ["HEADRACE_HISTORY"] = ""
