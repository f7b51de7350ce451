"""Seconds of a pass in closed form."""

from __future__ import annotations


def least_s(read_s: float, compute_s: float, read_slowdown: float, compute_slowdown: float) -> float:
    """Seconds that no schedule of this reading and computing goes below: as much as can be is done at once.

    A second of both at once does 1/read_slowdown of the one and 1/compute_slowdown of the other. Without slowdowns
    this is the longer of the two, with great ones their sum.
    """
    both_s = min(read_s * read_slowdown, compute_s * compute_slowdown)
    saved_share = max(0.0, 1 / read_slowdown + 1 / compute_slowdown - 1)
    return read_s + compute_s - both_s * saved_share
