"""Made-up speeds of an accelerator and the host in place of measuring: models load quickly, their plans are fixed."""

from __future__ import annotations

import pytest

from headrace.inference import calibration
from headrace.inference.layer_timing import TimedLayer
from headrace.machine.compute_curve import ComputeCurve, CurvePoint
from headrace.model.stored_model import StoredModel
from headrace.planning.rates import LayerTimes
from headrace.streaming.pressure import Pressure
from headrace.streaming.probe import machine as machine_probe
from measured_machines import accelerator, copies

POINTS = (CurvePoint(1, 1e-9), CurvePoint(1024, 2e-9))
ACCELERATOR = accelerator(
    [
        ComputeCurve(compute_dtype=compute, stored_dtype=stored, points=POINTS)
        for compute, stored in (("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32"))
    ],
    copies(2e8, while_computing=2e8, pageable=1e8, pageable_back=1e8, latency_s=1e-6),
    name="Fake 1",
    device="fake:0",
    memory_bytes=1 << 40,
    free_bytes=1 << 40,
    copied_bytes_per_s=1e12,
    block_overhead_s=4e-5,
    pass_overhead_s=1e-5,
)
TIMED_LAYER = TimedLayer(
    layers=(LayerTimes(prefill_s=2e-4, decode_s=1e-4),),
    decode_s=1e-4,
    stall_penalty_s=0.0,
    pass_overhead_s=1e-5,
    first_pass_overhead_s=1e-5,
    row_s=1e-6,
    head_seconds_per_parameter=1e-9,
)


class Gauge:
    """Finds what a test says of other work on the machine: nothing, by default."""

    def __init__(self, found: Pressure = Pressure()) -> None:  # noqa: B008 - immutable
        self._found = found

    def pressure(self) -> Pressure:
        """What was said."""
        return self._found


def _cpu_curve(model: StoredModel, compute_dtype: str) -> ComputeCurve:
    return ComputeCurve(compute_dtype=compute_dtype, stored_dtype=model.stored_dtype, points=POINTS)


def make_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be measured: speeds are the ones above, the disk does 100 MB/s, nothing else goes on."""
    monkeypatch.setattr(calibration, "PressureGauge", Gauge)
    monkeypatch.setattr(calibration, "probe_accelerator", lambda *_args, **_options: ACCELERATOR)
    monkeypatch.setattr(calibration, "time_layer", lambda *_args, **_options: TIMED_LAYER)
    monkeypatch.setattr(calibration, "_cpu_curve", _cpu_curve)
    monkeypatch.setattr(calibration, "_read_rate", lambda *_args: 1e8)
    monkeypatch.setattr(machine_probe, "memory_copy_rate", lambda: 1e10)
    monkeypatch.setattr(calibration, "_measure_disk", lambda *_args: calibration._Disk(1e8, 1e8, 1.0, 1e-4))
