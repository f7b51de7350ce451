"""Predictions against measurements: of the runs here, and of published ones."""
