"""The planning commands' own arithmetic: break-even, its ways, and what would help; by a described machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_checkpoints import STREAMED_DTYPE, streaming_budget, write_model
from headrace.cli.break_even import break_even_of
from headrace.cli.case_origin import from_description
from headrace.cli.plan_report import plan_json, recommended
from headrace.cli.planning_case import Asked, PlanningCase
from headrace.cli.remedy import remedy
from headrace.errors import InvalidRequestError, MachineError
from headrace.machine.compute_curve import ComputeCurve, CurvePoint
from headrace.machine.machine import Machine
from headrace.planning.plan import Workload
from headrace.planning.planner import Candidate
from measured_machines import computer

FLAT_UNTIL = 64
"""Tokens up to which a pass takes no longer on the machine below."""


def machine(*, read_bytes_per_s: float, flat_until: int = FLAT_UNTIL) -> Machine:
    points = tuple(CurvePoint(tokens, 1e-9) for tokens in sorted({1, flat_until}))
    return computer(
        [ComputeCurve(compute_dtype=name, stored_dtype="BF16", points=points) for name in ("bfloat16", "float32")],
        name="made up",
        memory_bytes=10**9,
        read_bytes_per_s=read_bytes_per_s,
        block_overhead_s=0.0,
        pass_overhead_s=0.0,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def case_of(
    model: Path,
    *,
    read_bytes_per_s: float,
    flat_until: int = FLAT_UNTIL,
    memory: str | None = None,
    dtype: str | None = STREAMED_DTYPE,
) -> PlanningCase:
    work = Workload(sequences=1, prompt_tokens=8, generate_tokens=8)
    memory = memory or f"{streaming_budget(model, prompt_tokens=8, new_tokens=8)}B"
    asked = Asked(memory=memory, workload=work, strategy=None, dtype=dtype, read_limit=None)
    made_up = machine(read_bytes_per_s=read_bytes_per_s, flat_until=flat_until)
    return from_description(model, asked, made_up, origin="a test")


def best_of(case: PlanningCase) -> Candidate:
    best = recommended(case.compare(None))
    assert best is not None
    return best


def test_break_even_is_where_arithmetic_takes_as_long_as_loading(model: Path) -> None:
    case = case_of(model, read_bytes_per_s=1e8)
    best = best_of(case)
    even = break_even_of(case, best)
    load_s = best.plan.streamed_bytes_per_pass / 1e8
    parameters = sum(block.active_parameters for block in case.request.model.blocks)
    assert even.tokens_per_pass == pytest.approx(FLAT_UNTIL * load_s / (parameters * 1e-9), rel=0.02)
    assert even.kv_cache_bytes == pytest.approx(even.tokens_per_pass * 16 * 2 * 3 * 32 * 2, rel=0.02)
    names = [way.name for way in even.ways]
    assert "prefill" in names
    assert "decode" not in names
    assert ("batch" in names) == case.fits(sequences=int(even.tokens_per_pass) + 1)
    assert "Break-even" in even.describe()


def test_speculation_reaches_a_low_break_even_and_a_slow_processor_is_past_it(model: Path) -> None:
    slow = case_of(model, read_bytes_per_s=1e10)
    even = break_even_of(slow, best_of(slow))
    assert even.tokens_per_pass < 1
    assert even.ways[0].name == "decode"
    assert "past already" in even.describe()
    steep = case_of(model, read_bytes_per_s=2e8, flat_until=1)
    even = break_even_of(steep, best_of(steep))
    assert 2 < even.tokens_per_pass < 16
    assert "speculation" in [way.name for way in even.ways]
    high = case_of(model, read_bytes_per_s=1e8)
    assert "speculation" not in [way.name for way in break_even_of(high, best_of(high)).ways]


def test_nothing_streamed_has_no_break_even(model: Path) -> None:
    case = case_of(model, read_bytes_per_s=1e8, memory="1GB")
    best = best_of(case)
    assert best.plan.streamed_blocks == 0
    assert break_even_of(case, best)[:3] == (0.0, 1, 0)
    assert "every weight is in memory" in remedy(case, best)


def test_remedies_are_what_planning_again_gives(model: Path) -> None:
    case = case_of(model, read_bytes_per_s=1e8)
    best = best_of(case)
    said = remedy(case, best)
    assert "The disk binds" in said
    needed = int(said.split("--memory ")[1].split(")")[0])
    assert case.with_budget(needed).plan.streamed_blocks == 0
    assert case.with_budget(needed - 1).plan.strategy.value != "resident"
    slow = case_of(model, read_bytes_per_s=1e10)
    assert "The processor binds" in remedy(slow, best_of(slow))


def test_the_dtype_that_fits_is_taken_before_the_faster_one(model: Path) -> None:
    case = case_of(model, read_bytes_per_s=1e8, memory="100MB", dtype=None)
    assert case.request.compute_dtype == "bfloat16"  # equally fast: the stored one
    assert case_of(model, read_bytes_per_s=1e8, dtype="float32", memory="100MB").request.compute_dtype == "float32"


def test_what_a_machine_file_cannot_answer_is_refused(model: Path) -> None:
    with pytest.raises(MachineError, match="float16"):
        case_of(model, read_bytes_per_s=1e8, dtype="float16")
    work = Workload(sequences=1, prompt_tokens=9000, generate_tokens=1)
    asked = Asked(memory=None, workload=work, strategy=None, dtype=None, read_limit=None)
    with pytest.raises(InvalidRequestError, match="8192"):
        from_description(model, asked, machine(read_bytes_per_s=1e8), origin="a test")


def test_weights_left_on_the_disk_are_counted(model: Path) -> None:
    case = case_of(model, read_bytes_per_s=1e8)
    report = plan_json(case, case.compare(None), best_of(case))
    overlap = next(item for item in report["strategies"] if item["name"] == "overlap")
    table = case.request.model.embedding.size_bytes
    assert overlap["memory_bytes"]["disk"] >= table
    assert overlap["memory_bytes"]["disk"] <= case.request.model.weights_bytes
    assert overlap["memory_bytes"]["host"] <= case.request.budget_bytes
