"""How far a prediction for the machine at hand may be off: its measured constants moved to their ends.

Where reading is measured, disks that are shared swing; where it is held at a limit, it is steady. Arithmetic is
measured with the model's own layer just before, so what remains is what other work on the machine takes. The link to
an accelerator is measured beside products just before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from headrace.machine.quantity import Interval, Quantity, interval_of
from headrace.model.stored_model import StoredModel
from headrace.planning.accelerator_pace import AcceleratorPace, predict_on_accelerator
from headrace.planning.estimate import LayerTimes, Pace, Prediction, predict
from headrace.planning.planner import Candidate

READ_RANGE = Quantity(1.0, 0.7, 1.25, "bench/results: raw reads of one file within an hour, against their median")
LIMITED_READ_RANGE = Quantity(1.0, 0.97, 1.01, "bench/results/prediction-steady: reads held at a limit")
COMPUTE_RANGE = Quantity(1.0, 0.9, 1.25, "bench/results/prediction-steady: passes bound by arithmetic")
LINK_RANGE = Quantity(1.0, 0.9, 1.03, "an assumption, until passes bound by a link have been measured on a GPU")


class PredictionInterval(NamedTuple):
    """Seconds and tokens per second, each with its ends."""

    prefill_s: Interval
    decode_s_per_pass: Interval
    tokens_per_s: Interval


def prediction_interval(
    model: StoredModel,
    candidate: Candidate,
    pace: Pace | AcceleratorPace,
    *,
    read_is_limited: bool,
    pinned: bool = True,
) -> PredictionInterval:
    """Predict the same plan with each constant at its low and its high end.

    They are the time of computing, the rate of reading and, with an accelerator's pace, the rate of its link. `pinned`:
    an accelerator's host memory is page-locked.
    """
    constants = {"read": LIMITED_READ_RANGE if read_is_limited else READ_RANGE, "compute": COMPUTE_RANGE}
    if isinstance(pace, AcceleratorPace):
        constants["link"] = LINK_RANGE

    @cache
    def predicted(read: float, compute: float, link: float) -> Prediction:
        if read == compute == link == 1.0:
            return candidate.prediction
        if isinstance(pace, AcceleratorPace):
            moved_pace = _scaled_on_accelerator(pace, read=read, compute=compute, link=link)
            return predict_on_accelerator(model, candidate.plan, moved_pace, pinned=pinned)
        return predict(model, candidate.plan, _scaled(pace, read=read, compute=compute))

    def moved(of: Callable[[Prediction], float]) -> Interval:
        def value(factors: Mapping[str, float]) -> float:
            return of(predicted(factors["read"], factors["compute"], factors.get("link", 1.0)))

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


def _scaled_on_accelerator(pace: AcceleratorPace, *, read: float, compute: float, link: float) -> AcceleratorPace:
    return replace(
        pace,
        device=_scaled(pace.device, read=read, compute=compute),
        link_bytes_per_s=pace.link_bytes_per_s * link,
        staged_bytes_per_s=pace.staged_bytes_per_s * link,
        processor_layer=_scaled_layer(pace.processor_layer, compute),
    )


def _scaled(pace: Pace, *, read: float, compute: float) -> Pace:
    return replace(
        pace,
        read_bytes_per_s=pace.read_bytes_per_s * read,
        curve=pace.curve.scaled(compute),
        head_curve=None if pace.head_curve is None else pace.head_curve.scaled(compute),
        layer=_scaled_layer(pace.layer, compute),
        block_overhead_s=pace.block_overhead_s * compute,
        pass_overhead_s=pace.pass_overhead_s * compute,
    )


def _scaled_layer(layer: LayerTimes | None, factor: float) -> LayerTimes | None:
    if layer is None:
        return None
    return LayerTimes(prefill_s=layer.prefill_s * factor, decode_s=layer.decode_s * factor)
