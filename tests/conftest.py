"""For all tests: no settings, history and remembered measurements of the user who runs them, and the CPU computes.

Tests of a GPU name it.
"""

from __future__ import annotations

import os

import pytest

os.environ["HEADRACE_CONFIG"] = ""
os.environ["HEADRACE_HISTORY"] = ""
os.environ["HEADRACE_MEASURED"] = ""
os.environ["HEADRACE_DEVICE"] = "cpu"
# A thread of a product that waits for another one gives its core away: where cores are shared, with the other half of
# the tests for one, spinning makes the small products of these tests ten times slower. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture
def made_up_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model measures nothing: for tests of what a model computes, which measuring makes many times slower."""
    from accelerator_machine import make_up

    make_up(monkeypatch)


@pytest.fixture(autouse=True)
def one_line_for_each_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said is compared in one line; cli/test_readable.py looks at how lines break."""
    monkeypatch.setenv("COLUMNS", "4000")
