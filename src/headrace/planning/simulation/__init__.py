"""Every strategy as an executable simulation on one event core; the closed forms must agree.

The time of a single layer comes from the same formulas as in the closed forms. What is executed is the schedule: which
copy waits for which slot, which computation for which copy, which stage for which micro-batch, which device for whom.
"""

from headrace.planning.simulation.many_devices import SimulatedWork, simulate_work

__all__ = ["SimulatedWork", "simulate_work"]
