"""A machine survives TOML unchanged, interpolates sensibly, and a bad file is refused by the name of its field."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import MachineError
from headrace.machine.probed_accelerator import ProbedAccelerator
from headrace.machine.probed_machine import ComputeCurve, CurvePoint, DiskDepth, ProbedMachine

times = st.floats(1e-15, 1e3)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def curves(draw: st.DrawFn, *, rising: bool = False) -> ComputeCurve:
    tokens = sorted(draw(st.sets(st.integers(1, 10**6), min_size=1, max_size=6)))
    seconds = draw(st.lists(times, min_size=len(tokens), max_size=len(tokens)))
    return ComputeCurve(
        compute_dtype=draw(texts),
        stored_dtype=draw(texts),
        points=tuple(itertools.starmap(CurvePoint, zip(tokens, sorted(seconds) if rising else seconds, strict=True))),
    )


rates = st.floats(1, 1e13)
accelerators = st.builds(
    ProbedAccelerator,
    name=texts,
    device=texts,
    memory_bytes=st.integers(2**40, 2**63 - 1),
    free_bytes=st.integers(0, 2**40),
    pinned_to_device_bytes_per_s=rates,
    pageable_to_device_bytes_per_s=rates,
    pinned_from_device_bytes_per_s=rates,
    pageable_from_device_bytes_per_s=rates,
    pinned_to_device_while_computing_bytes_per_s=rates,
    compute_slowdown_while_copying=st.floats(1, 1e3),
    copy_latency_s=st.floats(0, 1),
    launch_overhead_s=st.floats(0, 1),
    small_kernel_s=st.floats(0, 1),
    memory_bytes_per_s=rates,
    compute=st.lists(curves(), min_size=1, max_size=3).map(tuple),
    sources=st.dictionaries(texts, texts, max_size=3),
)

machines = st.builds(
    ProbedMachine,
    name=texts,
    memory_bytes=st.integers(1, 2**63 - 1),
    read_bytes_per_s=st.floats(1, 1e15),
    read_chunk_bytes=st.integers(4096, 2**40),
    reader_threads=st.integers(1, 64),
    compute=st.lists(curves(), max_size=3).map(tuple),
    block_overhead_s=st.floats(0, 10),
    pass_overhead_s=st.floats(0, 10),
    compute_slowdown=st.floats(1, 99),
    read_slowdown=st.floats(1, 99),
    read_latency_s=st.floats(0, 1),
    disk_depths=st.lists(
        st.builds(DiskDepth, st.integers(4096, 2**30), st.integers(1, 64), st.floats(1, 1e12)), max_size=3
    ).map(tuple),
    memory_bytes_per_s=st.none() | st.floats(1, 1e13),
    host_to_device_bytes_per_s=st.none() | st.floats(1, 1e13),
    accelerators=st.lists(accelerators, max_size=2, unique_by=lambda accelerator: accelerator.device).map(tuple),
    sources=st.dictionaries(texts, texts, max_size=3),
)

CURVE = ComputeCurve(
    compute_dtype="float32",
    stored_dtype="BF16",
    points=(CurvePoint(1, 1e-9), CurvePoint(4, 2e-9), CurvePoint(64, 8e-9)),
)
MACHINE = ProbedMachine(name="bench", memory_bytes=1 << 33, read_bytes_per_s=1.5e9, compute=(CURVE,))
ACCELERATOR = ProbedAccelerator(
    name="NVIDIA H200",
    device="cuda:0",
    memory_bytes=150 * 10**9,
    free_bytes=149 * 10**9,
    pinned_to_device_bytes_per_s=5e10,
    pageable_to_device_bytes_per_s=1e10,
    pinned_from_device_bytes_per_s=4e10,
    pageable_from_device_bytes_per_s=8e9,
    pinned_to_device_while_computing_bytes_per_s=4.2e10,
    compute_slowdown_while_copying=1.02,
    copy_latency_s=2e-5,
    launch_overhead_s=3e-6,
    small_kernel_s=4e-6,
    memory_bytes_per_s=4e12,
    compute=(
        ComputeCurve(
            compute_dtype="bfloat16",
            stored_dtype="BF16",
            points=(CurvePoint(1, 5e-13), CurvePoint(4096, 4096 * 2 / 6e14)),
        ),
        ComputeCurve(
            compute_dtype="float16",
            stored_dtype="F16",
            points=(CurvePoint(1, 5e-13), CurvePoint(4096, 4096 * 2 / 7e14)),
        ),
        ComputeCurve(
            compute_dtype="float32",
            stored_dtype="F32",
            points=(CurvePoint(1, 1e-12), CurvePoint(4096, 4096 * 2 / 5e13)),
        ),
    ),
    sources={"link": "a test"},
)
WITH_GPU = dataclasses.replace(MACHINE, accelerators=(ACCELERATOR,), host_to_device_bytes_per_s=5e10)


# -- TOML ------------------------------------------------------------------------------------------------------------


@given(machines)
def test_toml_and_back(machine: ProbedMachine) -> None:
    assert ProbedMachine.from_toml(machine.to_toml(), origin="x") == machine


def test_a_file_and_back(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(MACHINE.to_toml(), encoding="utf-8")
    assert ProbedMachine.load(path) == MACHINE


def test_whole_numbers_do_where_fractions_may_stand() -> None:
    assert ProbedMachine.from_toml(edited("disk", "read_bytes_per_s", 1_500_000_000), origin="x") == MACHINE


@pytest.mark.parametrize(
    ("table", "field", "attribute"),
    [
        ("disk", "slowdown_while_computing", "read_slowdown"),
        ("processor", "slowdown_while_reading", "compute_slowdown"),
    ],
)
def test_slowdowns_may_be_left_out(table: str, field: str, attribute: str) -> None:
    raw = tomllib.loads(MACHINE.to_toml())
    del raw[table][field], raw["sources"]
    assert getattr(ProbedMachine.from_toml(tomli_w.dumps(raw), origin="x"), attribute) == 1.0


def edited(*path_and_value: Any) -> str:
    """Return the TOML of MACHINE with one field changed; REMOVED takes it out."""
    *path, last, value = path_and_value
    raw: dict[str, Any] = tomllib.loads(MACHINE.to_toml())
    table: Any = raw
    for key in path:
        table = table[key]
    if value is REMOVED:
        del table[last]
    else:
        table[last] = value
    return tomli_w.dumps(raw)


REMOVED = object()
FIRST_CURVE = ("processor", "curves", 0)


@pytest.mark.parametrize(
    "path",
    [
        ("name",),
        ("memory_bytes",),
        ("disk",),
        ("disk", "read_bytes_per_s"),
        ("disk", "chunk_bytes"),
        ("disk", "threads"),
        ("processor",),
        ("processor", "block_overhead_s"),
        ("processor", "pass_overhead_s"),
        ("processor", "curves"),
        (*FIRST_CURVE, "compute_dtype"),
        (*FIRST_CURVE, "stored_dtype"),
        (*FIRST_CURVE, "tokens"),
        (*FIRST_CURVE, "seconds_per_parameter"),
    ],
)
@pytest.mark.parametrize(
    "value", [REMOVED, "wrong", True, [], [1, "x"]], ids=["removed", "text", "flag", "empty", "mixed"]
)
def test_a_field_that_is_missing_or_of_another_kind_is_named(path: tuple[str | int, ...], value: object) -> None:
    field = path[-1]
    accepted = {
        "name": "wrong",
        "compute_dtype": "wrong",
        "stored_dtype": "wrong",
    }
    if accepted.get(str(field)) == value or (field == "curves" and value == []):
        assert ProbedMachine.from_toml(edited(*path, value), origin="x")
        return
    with pytest.raises(MachineError) as caught:
        ProbedMachine.from_toml(edited(*path, value), origin="the file")
    assert str(caught.value).startswith("the file is not a machine description: ")
    assert str(field) in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("memory_bytes",), 0),
        (("memory_bytes",), -1),
        (("memory_bytes",), 1.5),
        (("memory_bytes",), float("inf")),
        (("memory_bytes",), "8GiB"),
        (("disk", "read_bytes_per_s"), 0),
        (("disk", "read_bytes_per_s"), -1e9),
        (("disk", "read_bytes_per_s"), float("inf")),
        (("disk", "read_bytes_per_s"), float("nan")),
        (("disk", "chunk_bytes"), 4095),
        (("disk", "chunk_bytes"), 1e6),
        (("disk", "threads"), 0),
        (("disk", "threads"), 10**9),
        (("disk", "slowdown_while_computing"), 0.5),
        (("disk", "slowdown_while_computing"), 100),
        (("disk", "slowdown_while_computing"), "slow"),
        (("processor", "block_overhead_s"), -0.1),
        (("processor", "block_overhead_s"), float("nan")),
        (("processor", "pass_overhead_s"), -0.1),
        (("processor", "pass_overhead_s"), float("inf")),
        (("processor", "slowdown_while_reading"), 0.99),
        ((*FIRST_CURVE, "tokens"), [1, 4]),
        ((*FIRST_CURVE, "tokens"), [4, 1, 64]),
        ((*FIRST_CURVE, "tokens"), [1, 1, 64]),
        ((*FIRST_CURVE, "tokens"), [0, 4, 64]),
        ((*FIRST_CURVE, "tokens"), [1.0, 4, 64]),
        ((*FIRST_CURVE, "seconds_per_parameter"), [1e-9, 0.0, 1e-9]),
        ((*FIRST_CURVE, "seconds_per_parameter"), [1e-9, -1e-9, 1e-9]),
        ((*FIRST_CURVE, "seconds_per_parameter"), [1e-9, float("nan"), 1e-9]),
        ((*FIRST_CURVE, "seconds_per_parameter"), [1e-9, float("inf"), 1e-9]),
        (("processor", "curves", 0), 7),
        (("sources",), "me"),
        (("sources", "disk"), 7),
    ],
)
def test_a_value_without_sense_is_named(path: tuple[str | int, ...], value: object) -> None:
    with pytest.raises(MachineError) as caught:
        ProbedMachine.from_toml(edited(*path, value), origin="the file")
    named = "curves" if path[-1] == 0 else str(path[-1])
    assert str(caught.value).startswith("the file is not a machine description: ")
    assert named in str(caught.value)


def test_a_curve_without_points_is_refused() -> None:
    raw = tomllib.loads(MACHINE.to_toml())
    raw["processor"]["curves"][0].update(tokens=[], seconds_per_parameter=[])
    with pytest.raises(MachineError, match=r"processor\.curves\[0\] \(tokens, .*at least one point"):
        ProbedMachine.from_toml(tomli_w.dumps(raw), origin="x")


@pytest.mark.parametrize("text", ["=", "[disk", "a = 1\na = 2", "", "a = " + "[" * 100_000])
def test_what_is_no_toml_is_refused(text: str) -> None:
    with pytest.raises(MachineError, match="the file is not a machine description"):
        ProbedMachine.from_toml(text, origin="the file")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"missing\.toml cannot be read"):
        ProbedMachine.load(tmp_path / "missing.toml")
    with pytest.raises(MachineError, match="cannot be read"):
        ProbedMachine.load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(MachineError, match=r"latin\.toml cannot be read"):
        ProbedMachine.load(tmp_path / "latin.toml")


# -- curves ------------------------------------------------------------------------------------------------------------


@given(curves())
def test_curves_are_exact_at_their_points(curve: ComputeCurve) -> None:
    for point in curve.points:
        assert curve.seconds_per_parameter(point.tokens) == point.seconds_per_parameter


@given(curves(), st.integers(1, 10**6))
def test_between_two_points_a_curve_stays_between_them(curve: ComputeCurve, tokens: int) -> None:
    for low, high in itertools.pairwise(curve.points):
        if low.tokens <= tokens <= high.tokens:
            least, most = sorted((low.seconds_per_parameter, high.seconds_per_parameter))
            assert least * (1 - 1e-9) <= curve.seconds_per_parameter(tokens) <= most * (1 + 1e-9)


@given(curves(rising=True), st.tuples(st.integers(1, 10**7), st.integers(1, 10**7)))
def test_a_rising_curve_never_falls(curve: ComputeCurve, tokens: tuple[int, int]) -> None:
    fewer, more = sorted(tokens)
    assert curve.seconds_per_parameter(fewer) <= curve.seconds_per_parameter(more) * (1 + 1e-9)


@given(curves(), st.floats(1, 1e3))
def test_beyond_the_last_point_time_is_proportional_to_tokens(curve: ComputeCurve, factor: float) -> None:
    last = curve.points[-1]
    seconds = curve.seconds_per_parameter(last.tokens * factor)
    assert seconds == pytest.approx(last.seconds_per_parameter * factor)


@given(curves())
def test_before_the_first_point_time_is_constant(curve: ComputeCurve) -> None:
    first = curve.points[0]
    assert curve.seconds_per_parameter(1) == first.seconds_per_parameter
    assert curve.seconds_per_parameter(first.tokens / 2) == first.seconds_per_parameter


def test_interpolation_is_straight_in_log_log() -> None:
    assert CURVE.seconds_per_parameter(2) == pytest.approx(2**0.5 * 1e-9)
    assert CURVE.seconds_per_parameter(16) == pytest.approx(4e-9)
    assert CURVE.seconds_per_parameter(128) == pytest.approx(16e-9)


@given(curves(), st.floats(0.01, 100), st.integers(1, 10**6))
def test_scaling_a_curve(curve: ComputeCurve, factor: float, tokens: int) -> None:
    scaled = curve.scaled(factor)
    assert scaled.seconds_per_parameter(tokens) == pytest.approx(factor * curve.seconds_per_parameter(tokens))
    assert (scaled.compute_dtype, scaled.stored_dtype) == (curve.compute_dtype, curve.stored_dtype)


def test_the_curve_of_a_pair_of_dtypes() -> None:
    assert MACHINE.curve(compute_dtype="float32", stored_dtype="BF16") is CURVE
    for compute, stored in (("float32", "F32"), ("bfloat16", "BF16")):
        with pytest.raises(MachineError, match=f"bench has no measurement of {compute} products with {stored}"):
            MACHINE.curve(compute_dtype=compute, stored_dtype=stored)


@pytest.mark.parametrize(
    "build",
    [
        lambda: ProbedMachine(name="x", memory_bytes=0, read_bytes_per_s=1e9, compute=()),
        lambda: ProbedMachine(name="x", memory_bytes=1, read_bytes_per_s=float("nan"), compute=()),
        lambda: ComputeCurve(compute_dtype="a", stored_dtype="b", points=()),
        lambda: ComputeCurve(compute_dtype="a", stored_dtype="b", points=(CurvePoint(2, 1.0), CurvePoint(1, 1.0))),
        lambda: ComputeCurve(compute_dtype="a", stored_dtype="b", points=(CurvePoint(1, float("nan")),)),
    ],
)
def test_values_are_checked_without_a_file_too(build: Callable[[], object]) -> None:
    with pytest.raises(MachineError):
        build()


# -- what was added later ----------------------------------------------------------------------------------------------


def test_a_file_without_the_later_fields_is_still_read() -> None:
    raw = tomllib.loads(MACHINE.to_toml())
    del raw["disk"]["read_latency_s"], raw["disk"]["depths"]
    assert "memory" not in raw
    assert "link" not in raw
    assert ProbedMachine.from_toml(tomli_w.dumps(raw), origin="x") == MACHINE


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("disk.read_latency_s", {"read_latency_s": -0.1}),
        ("disk.read_latency_s", {"read_latency_s": float("inf")}),
        ("memory.bytes_per_s", {"memory_bytes_per_s": 0.0}),
        ("link.host_to_device_bytes_per_s", {"host_to_device_bytes_per_s": -1.0}),
        (r"disk.depths\[0\].chunk_bytes", {"disk_depths": (DiskDepth(1, 1, 1e9),)}),
        (r"disk.depths\[1\].threads", {"disk_depths": (DiskDepth(4096, 1, 1e9), DiskDepth(4096, 0, 1e9))}),
        (r"disk.depths\[0\].bytes_per_s", {"disk_depths": (DiskDepth(4096, 1, 0.0),)}),
    ],
)
def test_later_fields_are_checked_too(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(MachineError, match=field):
        dataclasses.replace(MACHINE, **changes)


# -- accelerators ------------------------------------------------------------------------------------------------------

NUMBERS_OF_ACCELERATORS = {
    "memory_bytes": 1,
    "free_bytes": 0,
    "pinned_to_device_bytes_per_s": 1,
    "pageable_to_device_bytes_per_s": 1,
    "pinned_from_device_bytes_per_s": 1,
    "pageable_from_device_bytes_per_s": 1,
    "pinned_to_device_while_computing_bytes_per_s": 1,
    "compute_slowdown_while_copying": 1,
    "copy_latency_s": 0,
    "launch_overhead_s": 0,
    "small_kernel_s": 0,
    "memory_bytes_per_s": 1,
}
"""and the least that each may be"""


def test_a_machine_without_accelerators_is_written_as_before() -> None:
    assert "accelerators" not in tomllib.loads(MACHINE.to_toml())
    assert ProbedMachine.from_toml(MACHINE.to_toml(), origin="x").accelerators == ()


def test_accelerators_are_an_array_of_tables() -> None:
    text = WITH_GPU.to_toml()
    assert "[[accelerators]]" in text
    assert ProbedMachine.from_toml(text, origin="x") == WITH_GPU
    assert set(tomllib.loads(text)["accelerators"][0]) == {"name", "device", "curves", "sources"} | set(
        NUMBERS_OF_ACCELERATORS
    )


@pytest.mark.parametrize("field", ["name", "device", "curves", *NUMBERS_OF_ACCELERATORS])
@pytest.mark.parametrize("value", [REMOVED, "wrong", True, [1, "x"]], ids=["removed", "text", "flag", "mixed"])
def test_a_field_of_an_accelerator_that_is_missing_or_of_another_kind_is_named(field: str, value: object) -> None:
    raw = tomllib.loads(WITH_GPU.to_toml())
    if value is REMOVED:
        del raw["accelerators"][0][field]
    else:
        raw["accelerators"][0][field] = value
    text = tomli_w.dumps(raw)
    if value == "wrong" and field in {"name", "device"}:
        assert getattr(ProbedMachine.from_toml(text, origin="x").accelerators[0], field) == "wrong"
        return
    with pytest.raises(MachineError, match=rf"the file is not a machine description: .*accelerators\[0\]\.{field}"):
        ProbedMachine.from_toml(text, origin="the file")


@pytest.mark.parametrize("value", ["wrong", {}, [1], 7])
def test_what_is_no_array_of_accelerators_is_named(value: object) -> None:
    with pytest.raises(MachineError, match=r"accelerators is .* where an array of tables is expected"):
        ProbedMachine.from_toml(tomli_w.dumps(tomllib.loads(MACHINE.to_toml()) | {"accelerators": value}), origin="x")


def test_an_accelerator_may_leave_its_sources_out() -> None:
    raw = tomllib.loads(WITH_GPU.to_toml())
    del raw["accelerators"][0]["sources"]
    assert ProbedMachine.from_toml(tomli_w.dumps(raw), origin="x").accelerators[0].sources == {}


@pytest.mark.parametrize("field", NUMBERS_OF_ACCELERATORS)
def test_numbers_of_an_accelerator_that_have_no_sense_are_named(field: str) -> None:
    least = NUMBERS_OF_ACCELERATORS[field]
    changes: dict[str, Any] = {"free_bytes": 0, field: least}
    assert getattr(dataclasses.replace(ACCELERATOR, **changes), field) == least
    for value in (least - 0.5, -1.0, math.inf, math.nan):
        with pytest.raises(MachineError, match=f"NVIDIA H200: {field} is"):
            dataclasses.replace(ACCELERATOR, **(changes | {field: value}))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("curves is empty", {"compute": ()}),
        ("free_bytes is 150000000001; it must be at most memory_bytes", {"free_bytes": 150 * 10**9 + 1}),
    ],
)
def test_an_accelerator_that_contradicts_itself_is_refused(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(MachineError, match=message):
        dataclasses.replace(ACCELERATOR, **changes)


def test_a_device_that_is_named_twice_is_refused() -> None:
    other = dataclasses.replace(ACCELERATOR, device="cuda:1")
    assert dataclasses.replace(MACHINE, accelerators=(ACCELERATOR, other)).accelerators[1] is other
    with pytest.raises(MachineError, match="bench: accelerators names a device twice: cuda:0, cuda:0"):
        dataclasses.replace(MACHINE, accelerators=(ACCELERATOR, ACCELERATOR))


def test_the_curve_of_an_accelerator() -> None:
    found = ACCELERATOR.curve(compute_dtype="float16", stored_dtype="F16")
    assert found is ACCELERATOR.compute[1]
    assert found.flops == pytest.approx(7e14)
    assert found.weight_bytes_per_s == pytest.approx(4e12)
    with pytest.raises(MachineError, match="NVIDIA H200 has no measurement of float32 products with BF16"):
        ACCELERATOR.curve(compute_dtype="float32", stored_dtype="BF16")


# -- a curve bent through measured points ------------------------------------------------------------------------------


def seconds_at(curve: ComputeCurve) -> dict[int, float]:
    return {point.tokens: point.seconds_per_parameter for point in curve.points}


def test_a_curve_bent_through_one_point_is_scaled() -> None:
    bent = CURVE.through([CurvePoint(4, 6e-9)])
    assert seconds_at(bent) == pytest.approx({1: 3e-9, 4: 6e-9, 64: 24e-9})


def test_between_two_points_the_error_is_between_theirs() -> None:
    """Three times too fast at 1 token, right at 64: at 8 tokens, half way in logarithms, the root of three."""
    bent = CURVE.through([CurvePoint(1, 3e-9), CurvePoint(64, 8e-9)])
    assert bent.points[0] == (1, 3e-9)
    assert bent.points[-1] == (64, 8e-9)
    at_4 = 2e-9 * 3 ** (1 - math.log(4) / math.log(64))
    assert bent.seconds_per_parameter(4) == pytest.approx(at_4)


def test_points_beyond_the_curve_extend_it() -> None:
    bent = CURVE.through([CurvePoint(128, 32e-9), CurvePoint(256, 64e-9)])
    assert seconds_at(bent) == pytest.approx({1: 2e-9, 4: 4e-9, 64: 16e-9, 128: 32e-9, 256: 64e-9})


@given(curves(), curves())
def test_a_bent_curve_passes_through_what_was_measured(curve: ComputeCurve, measured: ComputeCurve) -> None:
    bent = curve.through(measured.points)
    for tokens, time_s in measured.points:
        assert bent.seconds_per_parameter(tokens) == pytest.approx(time_s)
    assert curve.through(()) is curve
