"""Scenario to plans to predictions: placements, memory, simulation, closed forms. Pure values: no torch, no threads."""
