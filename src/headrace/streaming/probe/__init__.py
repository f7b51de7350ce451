"""Measures a machine: disk, arithmetic, link, and how they interfere."""
