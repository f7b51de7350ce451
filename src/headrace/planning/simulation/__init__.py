"""Schedules played in continuous time: one copy block by block, and every arrangement on one event core."""
