"""How far a prediction for the machine at hand may be off: its two measured constants moved to their ends.

Where reading is measured, disks that are shared swing; where it is held at a limit, it is steady. Arithmetic is
measured with the model's own layer just before, so what remains is what other work on the machine takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

from headrace.planning.estimate import LayerTimes, Pace, Prediction, predict
from headrace.planning.model_spec import ModelSpec
from headrace.planning.planner import Candidate
from headrace.planning.quantity import Quantity
from headrace.planning.rates import Interval, interval_of

READ_RANGE = Quantity(1.0, 0.7, 1.25, "bench/results: raw reads of one file within an hour, against their median")
LIMITED_READ_RANGE = Quantity(1.0, 0.97, 1.01, "bench/results/prediction-steady: reads held at a limit")
COMPUTE_RANGE = Quantity(1.0, 0.9, 1.25, "bench/results/prediction-steady: passes bound by arithmetic")


class PredictionInterval(NamedTuple):
    """Seconds and tokens per second, each with its ends."""

    prefill_s: Interval
    decode_s_per_pass: Interval
    tokens_per_s: Interval


def prediction_interval(
    spec: ModelSpec, candidate: Candidate, pace: Pace, *, read_is_limited: bool
) -> PredictionInterval:
    """Predict the same plan with either constant at its low and its high end (time of computing, rate of reading)."""
    constants = {"read": LIMITED_READ_RANGE if read_is_limited else READ_RANGE, "compute": COMPUTE_RANGE}

    def moved(of: Callable[[Prediction], float]) -> Interval:
        def value(factors: Mapping[str, float]) -> float:
            if all(factor == 1.0 for factor in factors.values()):
                return of(candidate.prediction)
            return of(predict(spec, candidate.plan, _scaled(pace, factors)))

        return interval_of(constants, value)

    decode_s = moved(lambda prediction: prediction.decode_s_per_pass)
    sequences = candidate.plan.workload.sequences
    return PredictionInterval(
        prefill_s=moved(lambda prediction: prediction.prefill_s),
        decode_s_per_pass=decode_s,
        tokens_per_s=Interval(
            expected=sequences / decode_s.expected, low=sequences / decode_s.high, high=sequences / decode_s.low
        ),
    )


def _scaled(pace: Pace, factors: Mapping[str, float]) -> Pace:
    compute = factors["compute"]
    layer = pace.layer
    if layer is not None:
        layer = LayerTimes(prefill_s=layer.prefill_s * compute, decode_s=layer.decode_s * compute)
    return replace(
        pace,
        read_bytes_per_s=pace.read_bytes_per_s * factors["read"],
        curve=pace.curve.scaled(compute),
        head_curve=None if pace.head_curve is None else pace.head_curve.scaled(compute),
        layer=None
        if layer is None
        else LayerTimes(prefill_s=layer.prefill_s * compute, decode_s=layer.decode_s * compute),
        block_overhead_s=pace.block_overhead_s * compute,
        pass_overhead_s=pace.pass_overhead_s * compute,
    )
