"""What a published figure should be by the formulas: each kind of metric from the times of a workload."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from headrace.accuracy.published import Row
from headrace.accuracy.published_case import FAMILIES, Case, Excluded, case_of, family_of, is_fitted, machine_of
from headrace.accuracy.published_operations import operation_of
from headrace.errors import HeadraceError
from headrace.machine.quantity import Interval, Quantity, interval_of
from headrace.planning.closed_form import ClosedForm, PassCost, WorkCost
from headrace.planning.described_rates import quantities
from headrace.planning.splits import device_fits
from headrace.planning.workload import PassTokens, Workload

_SERVED_LENGTH_SHARE = 0.9
"""lengths of a serving benchmark are drawn from 80 to 100 % of the nominal ones"""
_UNSTATED = Quantity(1.0, 0.5, 2.0, "something that matters is not stated by the source")
_UNSTATED_BATCH = Quantity(1.0, 0.2, 6.0, "the source does not state the batch; one was assumed")
_QUEUE = Quantity(1.8, 0.7, 7.0, "queueing and chunking of prompts, which no source describes")
_REQUEST_S = 0.02
"""taking a request and sending its first token: estimate"""
_MOST_SEQUENCES = 4096


@dataclass(frozen=True, kw_only=True)
class PredictedRow:
    """A row's prediction beside its measurement, in the row's unit; or why there is none.

    A row may be both: predicted with an interval, and excluded from the errors because its source says too little.
    """

    row: Row
    family: str
    predicted: Interval | None
    excluded: str | None

    @property
    def error(self) -> float | None:
        """Absolute relative error of the expected value; None where excluded or measured as zero."""
        if self.predicted is None or self.excluded is not None or self.row.value <= 0:
            return None
        return abs(self.predicted.expected / self.row.value - 1.0)

    @property
    def inside(self) -> bool | None:
        """Whether the measurement lies in the interval."""
        return None if self.predicted is None else self.predicted.low <= self.row.value <= self.predicted.high


def predict_row(row: Row) -> PredictedRow:
    """Predict one row, or say why it is excluded. Nothing that a row holds makes this fail."""
    family = family_of(row)
    try:
        operation = operation_of(row, machine_of(row))
        if operation is not None and not is_fitted(row):
            return PredictedRow(row=row, family=family, predicted=operation, excluded=None)
        case = case_of(row)
        predicted = predict_case(case)
        return PredictedRow(row=row, family=case.family, predicted=predicted, excluded=case.estimate_only)
    except Excluded as reason:
        return PredictedRow(row=row, family=family, predicted=None, excluded=str(reason))
    except HeadraceError as error:
        return PredictedRow(row=row, family=family, predicted=None, excluded=f"cannot be planned: {error}")


def predict_case(case: Case) -> Interval:
    """The metric of a case with its interval. Raises Excluded for metrics that are not times of a model."""
    return interval_of(*figure_of(case))


def figure_of(case: Case) -> tuple[dict[str, Quantity], Callable[[Mapping[str, float]], float]]:
    """Return the constants that a case's metric depends on, and the metric as a function of their values.

    Raises Excluded for metrics that are not times of a model.
    """
    metric, unit = case.row.metric, case.row.unit
    if metric not in METRICS:
        raise Excluded(f"{metric} is no time that the planner predicts")
    factor = _UNITS.get(unit)
    if factor is None:
        raise Excluded(f"the unit {unit!r} is not known")
    if case.row.batch_text.startswith("max"):
        case = _filled_batch(case)
    constants = quantities(case.scenario, case.arrangement)
    if case.unstated:
        constants["unstated"] = _UNSTATED_BATCH if case.assumed_batch else _UNSTATED
    if metric == "ttft_serving":
        constants["queue"] = _QUEUE
    by_rate = unit == "tok/s"

    def value(values: Mapping[str, float]) -> float:
        seconds = METRICS[metric](case, ClosedForm.of(case.scenario, case.arrangement, values))
        off = values.get("unstated", 1.0) * values.get("queue", 1.0)
        return seconds / off / factor if by_rate else seconds * off / factor

    return constants, value


def _filled_batch(case: Case) -> Case:
    """As many sequences at once as memory holds: unlimited concurrency."""
    more = range(2, _MOST_SEQUENCES)
    held = 1 + bisect.bisect_left(
        more, x=True, key=lambda number: not device_fits(case.scenario.batch(number), case.arrangement)
    )
    # Sequences end at different times: on the average a little less than all places are taken by full contexts.
    return replace(case, scenario=case.scenario.batch(held), unstated=True)


def _work(case: Case, form: ClosedForm) -> WorkCost:
    return form.work(case.scenario.workload, case.scenario.speculation)


def _throughput(case: Case, form: ClosedForm) -> float:
    """Generated tokens per second of the whole work, prefill included.

    Where prompts come all the time, each decode pass carries its share of a prefill.
    """
    work = case.scenario.workload
    if case.row.batch_text.startswith("max"):
        return work.sequences / _served_step_s(case, form)
    copies = case.arrangement.parallelism.devices if case.row.per_device else 1
    return work.sequences * work.generate_tokens / copies / _work(case, form).total_s


def _served_step_s(case: Case, form: ClosedForm) -> float:
    """A decode pass of all sequences and the share of a prefill that comes with it on the average.

    Such a prefill, beside running sequences, is its arithmetic: the weights are read by the pass anyhow.
    """
    work = _served(case)
    alone = _prefill_alone(form, work)
    prefill_s = max(0.0, alone.total_s - alone.parts["overhead"])
    return form.work(work).decode_s_per_pass + work.sequences / work.generate_tokens * prefill_s


def _served(case: Case) -> Workload:
    drawn = 1.0 if case.row.batch_text.startswith("max") else _SERVED_LENGTH_SHARE
    return replace(
        case.scenario.workload,
        prompt_tokens=max(1, round(case.scenario.workload.prompt_tokens * drawn)),
        generate_tokens=max(1, round(case.scenario.workload.generate_tokens * drawn)),
    )


def _prefill_alone(form: ClosedForm, work: Workload) -> PassCost:
    tokens = work.prompt_tokens
    return form.one_pass(PassTokens(sequences=1, new_tokens=tokens, context_tokens=tokens))


def _first_token(case: Case, form: ClosedForm) -> float:
    work = _served(case)
    # Where all ask at once the prompts queue; in a steady state few do.
    waiting = 1.0 + 0.15 * (work.sequences - 1)
    return _REQUEST_S + _prefill_alone(form, work).total_s * min(waiting, 4.0) + _served_step_s(case, form)


def _per_token_over_batch(case: Case, form: ClosedForm) -> float:
    cost, work = _work(case, form), case.scenario.workload
    if "world_size" in case.row.notes or "world size" in case.row.notes:
        # Every device holds a copy of the batch, and the source counts all of them.
        gather = case.scenario.model.weights_bytes / form.rates.exchange.peer.bytes_per_s
        return (cost.decode_s_per_pass + gather) / work.sequences
    return cost.total_s / work.generate_tokens / work.sequences


def _prefill_rate(case: Case, form: ClosedForm) -> float:
    work = case.scenario.workload
    return work.sequences * work.prompt_tokens / _work(case, form).prefill_s


def _single_stream(case: Case, form: ClosedForm) -> float:
    undivided = replace(case.arrangement.parallelism, micro_batches=1)
    alone = form._replace(arrangement=case.arrangement._replace(parallelism=undivided))
    return _work(replace(case, scenario=case.scenario.batch(1)), alone).tokens_per_s


METRICS: dict[str, Callable[[Case, ClosedForm], float]] = {
    "throughput": _throughput,
    "decode_throughput": lambda case, form: _work(case, form).tokens_per_s,
    "decode_throughput_single_stream": _single_stream,
    "prefill_throughput": _prefill_rate,
    "total_latency": lambda case, form: _work(case, form).total_s,
    "prefill_latency": lambda case, form: _work(case, form).prefill_s,
    "decode_latency_per_token": lambda case, form: _work(case, form).decode_s_per_pass,
    "decode_latency_total": (
        lambda case, form: _work(case, form).decode_s_per_pass * case.scenario.workload.generate_tokens
    ),
    "ms_per_token_divided_by_batch": _per_token_over_batch,
    "tpot_serving": _served_step_s,
    "ttft_serving": _first_token,
}
_UNITS = {"ms": 1e-3, "s": 1.0, "us": 1e-6, "tok/s": 1.0}


@dataclass(frozen=True, kw_only=True)
class FamilyAccuracy:
    """Errors of one family: shares of the measured value."""

    family: str
    n: int
    excluded: int
    median_abs_error: float | None
    p90_abs_error: float | None
    inside_interval: float | None
    interval_width: float | None
    """high over low, in the middle of the rows that count"""


def accuracy_by_family(rows: list[PredictedRow]) -> list[FamilyAccuracy]:
    """Errors of each family in turn."""
    return [accuracy_of(family, [item for item in rows if item.family == family]) for family in FAMILIES]


def accuracy_of(name: str, rows: list[PredictedRow]) -> FamilyAccuracy:
    """Median and 90th percentile of the absolute relative error, and the share of rows inside their interval."""
    errors = sorted(item.error for item in rows if item.error is not None)
    inside = [item.inside for item in rows if item.inside is not None]
    widths = sorted(
        item.predicted.high / item.predicted.low
        for item in rows
        if item.predicted is not None and item.excluded is None and item.predicted.low > 0
    )
    return FamilyAccuracy(
        family=name,
        n=len(errors),
        excluded=len(rows) - len(errors),
        median_abs_error=_quantile(errors, 0.5),
        p90_abs_error=_quantile(errors, 0.9),
        inside_interval=sum(inside) / len(inside) if inside else None,
        interval_width=_quantile(widths, 0.5),
    )


def _quantile(ordered: list[float], share: float) -> float | None:
    """Quantile by linear interpolation; None of nothing."""
    if not ordered:
        return None
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
