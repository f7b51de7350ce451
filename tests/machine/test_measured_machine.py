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

from headrace.dtypes import ARITHMETIC_FORMATS
from headrace.errors import MachineError
from headrace.machine.compute_curve import Arithmetic, ComputeCurve, CurvePoint
from headrace.machine.machine import Copies, Disk, Host, Link, Machine, Processor
from headrace.machine.machine_file import KINDS, load_machine, machine_from_toml, machine_to_toml
from headrace.machine.quantity import Quantity
from measured_machines import accelerator, computer, copies, exact

times = st.floats(1e-15, 1e3)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@st.composite
def curves(draw: st.DrawFn, *, rising: bool = False) -> ComputeCurve:
    tokens = sorted(draw(st.sets(st.integers(1, 10**6), min_size=1, max_size=6)))
    seconds = draw(st.lists(times, min_size=len(tokens), max_size=len(tokens)))
    return ComputeCurve(
        compute_dtype=draw(texts),
        stored_dtype=draw(texts),
        points=tuple(itertools.starmap(CurvePoint, zip(tokens, sorted(seconds) if rising else seconds, strict=True))),
    )


def quantities(least: float, most: float) -> st.SearchStrategy[Quantity]:
    """Exact ones, and ranges; a few sources, so that some are shared and others are not."""
    value = st.floats(least, most)
    sources = st.sampled_from(["measured", "a data sheet", "recalled: *"])
    ends = st.lists(value, min_size=3, max_size=3).map(sorted)
    ranges = st.builds(lambda ends, source: Quantity(ends[1], ends[0], ends[2], source), ends, sources)
    return st.builds(Quantity.of, value, sources) | ranges


rates = quantities(1, 1e13)
delays = quantities(0, 1)
sizes = st.integers(1, 2**60).map(float)
arithmetics = st.builds(
    Arithmetic,
    curves=st.lists(curves(), min_size=1, max_size=3).map(tuple),
    block_overhead_s=delays,
    pass_overhead_s=delays,
    slowdown_while_reading=quantities(1, 99),
    slowdown_of_reading=quantities(1, 99),
    source=texts,
)


copied = st.builds(
    Copies,
    bytes_per_s=rates,
    while_computing_bytes_per_s=rates,
    pageable_bytes_per_s=rates,
    pageable_back_bytes_per_s=rates,
    latency_s=delays,
    page_locked=st.booleans(),
)
disks = st.builds(
    Disk,
    bytes_per_s=rates,
    latency_s=delays,
    size_bytes=st.none() | sizes,
    chunk_bytes=st.integers(4096, 2**40),
    threads=st.integers(1, 64),
)
hosts = st.builds(
    Host,
    memory_bytes=sizes,
    memory_bytes_per_s=rates,
    flops=rates,
    power_w=st.none() | rates,
    arithmetic=st.just(Arithmetic()) | arithmetics,
)
UPLINKS: tuple[dict[str, str | None], ...] = ({}, {"scale_up": None}, {"network": "spine", "spine": None})


@st.composite
def processors(draw: st.DrawFn, *, device: str = "", measured: bool = False) -> Processor:
    memory_bytes = draw(sizes)
    return Processor(
        name=draw(texts),
        kind=draw(st.sampled_from(KINDS)),
        memory_bytes=memory_bytes,
        memory_bytes_per_s=draw(rates),
        flops=draw(st.dictionaries(st.sampled_from(ARITHMETIC_FORMATS), rates, max_size=3)) | {"bf16": draw(rates)},
        achievable=draw(quantities(0.01, 1)),
        power_w=draw(st.none() | rates),
        rent_usd_per_h=draw(st.none() | rates),
        price_usd=draw(st.none() | rates),
        device=device,
        free_bytes=draw(st.none() | st.integers(0, int(memory_bytes)).map(float)),
        arithmetic=draw(arithmetics) if measured or device else Arithmetic(),
        copies=draw(copied) if device else None,
    )


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """Described ones, CPUs that were measured, and computers with up to two measured accelerators."""
    named = draw(st.lists(texts, max_size=2, unique=True))
    processor = draw(processors(device=named[0])) if named else draw(processors(measured=draw(st.booleans())))
    links = {
        name: Link(name=name, bytes_per_s=draw(rates), latency_s=draw(delays), uplink=uplink)
        for name, uplink in draw(st.sampled_from(UPLINKS)).items()
    }
    if processor.copies is not None:
        links["host"] = processor.copies.link()
    return Machine(
        name=draw(texts),
        processor=processor,
        devices=draw(st.integers(1, 1000)),
        nodes=draw(st.integers(1, 1000)),
        host=draw(hosts if named else st.none() | hosts),
        disk=draw(disks if processor.arithmetic.curves else st.none() | disks),
        links=links,
        others=tuple(draw(processors(device=device)) for device in named[1:]),
        notes=tuple(draw(st.lists(texts, max_size=2))),
    )


CURVE = ComputeCurve(
    compute_dtype="float32",
    stored_dtype="BF16",
    points=(CurvePoint(1, 1e-9), CurvePoint(4, 2e-9), CurvePoint(64, 8e-9)),
)
MACHINE = computer([CURVE], block_overhead_s=0.001, slowdown_while_reading=1.5, slowdown_of_reading=1.25)
ACCELERATOR = accelerator(
    [
        ComputeCurve(
            compute_dtype=compute,
            stored_dtype=stored,
            points=(CurvePoint(1, one_s), CurvePoint(4096, 4096 * 2 / flops)),
        )
        for compute, stored, one_s, flops in (
            ("bfloat16", "BF16", 5e-13, 6e14),
            ("float16", "F16", 5e-13, 7e14),
            ("float32", "F32", 1e-12, 5e13),
        )
    ],
    copies(5e10, while_computing=4.2e10, pageable=1e10, pageable_back=8e9, latency_s=2e-5),
    name="NVIDIA H200",
    device="cuda:0",
    memory_bytes=150 * 10**9,
    free_bytes=149 * 10**9,
    copied_bytes_per_s=4e12,
    block_overhead_s=1.2e-4,
)
WITH_GPU = computer([CURVE], ACCELERATOR)


# -- TOML ------------------------------------------------------------------------------------------------------------


@given(machines())
def test_toml_and_back(machine: Machine) -> None:
    assert machine_from_toml(machine_to_toml(machine), origin="x") == machine


def test_a_file_and_back(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    for machine in (MACHINE, WITH_GPU):
        path.write_text(machine_to_toml(machine), encoding="utf-8")
        assert load_machine(path) == machine


def edited(machine: Machine, *path_and_value: Any) -> str:
    """Return a machine's TOML with one field changed; REMOVED takes it out."""
    *path, last, value = path_and_value
    raw: dict[str, Any] = tomllib.loads(machine_to_toml(machine))
    table: Any = raw
    for key in path:
        table = table[key]
    if value is REMOVED:
        del table[last]
    else:
        table[last] = value
    return tomli_w.dumps(raw)


REMOVED = object()
ARITHMETIC = ("processor", "arithmetic")
FIRST_CURVE = (*ARITHMETIC, "curves", 0)
COPIES = ("processor", "copies")
NEEDED = [
    ("name",),
    ("disk",),
    ("disk", "rate"),
    ("host",),
    ("host", "memory"),
    ("host", "memory_rate"),
    ("host", "flops"),
    ("processor",),
    ("processor", "name"),
    ("processor", "kind"),
    ("processor", "memory"),
    ("processor", "memory_rate"),
    ("processor", "flops"),
    ("processor", "device"),
    ("processor", "copies"),
    (*FIRST_CURVE, "compute_dtype"),
    (*FIRST_CURVE, "stored_dtype"),
    (*FIRST_CURVE, "tokens"),
    (*FIRST_CURVE, "time_per_weight"),
    *((*COPIES, field) for field in ("rate", "while_computing", "pageable", "pageable_back", "page_locked")),
]
OPTIONAL = [
    ("devices",),
    ("nodes",),
    ("processor", "achievable"),
    ("processor", "free"),
    (*ARITHMETIC, "block_overhead"),
    (*COPIES, "latency"),
    ("disk", "latency"),
    ("disk", "chunk"),
    ("disk", "threads"),
]
OTHER_KINDS = [pytest.param(value, id=name) for name, value in (("text", "wrong"), ("flag", True), ("mixed", [1, "x"]))]


@pytest.mark.parametrize("path", NEEDED)
def test_a_field_that_is_missing_is_named(path: tuple[str | int, ...]) -> None:
    with pytest.raises(MachineError) as caught:
        machine_from_toml(edited(WITH_GPU, *path, REMOVED), origin="the file")
    assert str(caught.value).startswith("the file is not a machine description: ")
    assert str(path[-1]) in str(caught.value)


@pytest.mark.parametrize("path", [*NEEDED, *OPTIONAL, (*ARITHMETIC, "curves"), (*FIRST_CURVE,)])
@pytest.mark.parametrize("value", OTHER_KINDS)
def test_a_field_of_another_kind_is_named(path: tuple[str | int, ...], value: object) -> None:
    if (value == "wrong" and path[-1] in {"name", "device", "compute_dtype", "stored_dtype"}) or (
        value is True and path[-1] == "page_locked"
    ):
        assert machine_from_toml(edited(WITH_GPU, *path, value), origin="x")
        return
    with pytest.raises(MachineError) as caught:
        machine_from_toml(edited(WITH_GPU, *path, value), origin="the file")
    assert str(caught.value).startswith("the file is not a machine description: ")
    assert str("curves" if path[-1] == 0 else path[-1]) in str(caught.value)


@pytest.mark.parametrize("path", OPTIONAL)
def test_a_field_that_is_not_needed_may_be_missing(path: tuple[str, ...]) -> None:
    assert machine_from_toml(edited(WITH_GPU, *path, REMOVED), origin="x").is_calibrated


@pytest.mark.parametrize("table", [(), ("processor",), ("host",), ("disk",), ARITHMETIC, FIRST_CURVE, COPIES])
def test_a_field_that_means_nothing_is_named(table: tuple[str | int, ...]) -> None:
    with pytest.raises(MachineError, match=r"tokns is no field of a machine.*known: "):
        machine_from_toml(edited(WITH_GPU, *table, "tokns", 1), origin="x")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("processor", "memory"), "0GB"),
        (("processor", "memory"), "-1GB"),
        (("processor", "memory"), 80),
        (("processor", "memory"), "inf"),
        (("processor", "free"), "151GB"),
        (("processor", "free"), "-1GB"),
        (("processor", "memory_rate"), "0GB/s"),
        (("disk", "rate"), "0GB/s"),
        (("disk", "rate"), "-1GB/s"),
        (("disk", "rate"), 1e9),
        (("disk", "rate"), float("nan")),
        (("disk", "latency"), "-1us"),
        (("disk", "latency"), "1GB"),
        (("disk", "chunk"), "4095B"),
        (("disk", "chunk"), "4096.5B"),
        (("disk", "threads"), 0),
        (("disk", "threads"), 10**9),
        (("disk", "threads"), 2.0),
        ((*ARITHMETIC, "slowdown_while_reading"), 0.99),
        ((*ARITHMETIC, "slowdown_while_reading"), 100),
        ((*ARITHMETIC, "slowdown_of_reading"), 0.5),
        ((*ARITHMETIC, "slowdown_of_reading"), "slow"),
        ((*ARITHMETIC, "block_overhead"), "-0.1s"),
        ((*ARITHMETIC, "pass_overhead"), float("inf")),
        ((*ARITHMETIC, "source"), 7),
        ((*FIRST_CURVE, "tokens"), [1]),
        ((*FIRST_CURVE, "tokens"), [4096, 1]),
        ((*FIRST_CURVE, "tokens"), [1, 1]),
        ((*FIRST_CURVE, "tokens"), [0, 4096]),
        ((*FIRST_CURVE, "tokens"), [1.0, 4096]),
        ((*FIRST_CURVE, "time_per_weight"), ["1ns", "0ns"]),
        ((*FIRST_CURVE, "time_per_weight"), ["1ns", "-1ns"]),
        ((*FIRST_CURVE, "time_per_weight"), ["1ns", 1e-9]),
        ((*FIRST_CURVE, "time_per_weight"), ["1ns", float("nan")]),
        ((*COPIES, "rate"), "0GB/s"),
        ((*COPIES, "while_computing"), "0GB/s"),
        ((*COPIES, "pageable"), "-1GB/s"),
        ((*COPIES, "pageable_back"), "9Gb/s"),
        ((*COPIES, "latency"), 2),
    ],
)
def test_a_value_without_sense_is_named(path: tuple[str | int, ...], value: object) -> None:
    with pytest.raises(MachineError) as caught:
        machine_from_toml(edited(WITH_GPU, *path, value), origin="the file")
    assert str(caught.value).startswith("the file is not a machine description: ")
    assert str(path[-1]) in str(caught.value)


def test_a_curve_without_points_is_refused() -> None:
    raw = tomllib.loads(machine_to_toml(MACHINE))
    raw["processor"]["arithmetic"]["curves"][0].update(tokens=[], time_per_weight=[])
    with pytest.raises(MachineError, match=r"processor\.arithmetic\.curves\[0\] \(tokens, .*at least one point"):
        machine_from_toml(tomli_w.dumps(raw), origin="x")


@pytest.mark.parametrize("text", ["=", "[disk", "a = 1\na = 2", "", "a = " + "[" * 100_000])
def test_what_is_no_toml_is_refused(text: str) -> None:
    with pytest.raises(MachineError, match="the file is not a machine description"):
        machine_from_toml(text, origin="the file")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"missing\.toml cannot be read"):
        load_machine(tmp_path / "missing.toml")
    with pytest.raises(MachineError, match="cannot be read"):
        load_machine(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(MachineError, match=r"latin\.toml cannot be read"):
        load_machine(tmp_path / "latin.toml")


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
    assert MACHINE.processor.curve(compute_dtype="float32", stored_dtype="BF16") is CURVE
    for compute, stored in (("float32", "F32"), ("bfloat16", "BF16")):
        with pytest.raises(MachineError, match=f"bench has no measurement of {compute} products with {stored}"):
            MACHINE.processor.curve(compute_dtype=compute, stored_dtype=stored)


@pytest.mark.parametrize(
    "build",
    [
        lambda: computer([CURVE], memory_bytes=0),
        lambda: computer([CURVE], read_bytes_per_s=float("nan")),
        lambda: computer([CURVE], read_latency_s=-0.1),
        lambda: computer([]),
        lambda: Disk(bytes_per_s=exact(1), latency_s=exact(0), threads=0),
        lambda: ComputeCurve(compute_dtype="a", stored_dtype="b", points=()),
        lambda: ComputeCurve(compute_dtype="a", stored_dtype="b", points=(CurvePoint(2, 1.0), CurvePoint(1, 1.0))),
        lambda: ComputeCurve(compute_dtype="a", stored_dtype="b", points=(CurvePoint(1, float("nan")),)),
        lambda: Arithmetic(slowdown_of_reading=exact(0.5)),
    ],
)
def test_values_are_checked_without_a_file_too(build: Callable[[], object]) -> None:
    with pytest.raises(MachineError):
        build()


# -- accelerators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("curves is empty", {"arithmetic": Arithmetic()}),
        ("free is 150000000001 bytes; it must be at most memory", {"free_bytes": 150 * 10**9 + 1}),
        ("device and copies are given together", {"device": ""}),
        ("device and copies are given together", {"copies": None}),
    ],
)
def test_an_accelerator_that_contradicts_itself_is_refused(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(MachineError, match=f"NVIDIA H200: {message}"):
        dataclasses.replace(ACCELERATOR, **changes)


def test_a_device_that_is_named_twice_is_refused() -> None:
    other = dataclasses.replace(ACCELERATOR, device="cuda:1")
    assert computer([CURVE], ACCELERATOR, other).accelerators == (ACCELERATOR, other)
    with pytest.raises(MachineError, match="bench: others names no device, or one twice: cuda:0, cuda:0"):
        computer([CURVE], ACCELERATOR, ACCELERATOR)


def test_what_a_calibrated_machine_needs_is_named() -> None:
    with pytest.raises(MachineError, match="bench: disk is missing"):
        dataclasses.replace(MACHINE, disk=None)
    with pytest.raises(MachineError, match="bench: host is missing"):
        dataclasses.replace(WITH_GPU, host=None)
    described = dataclasses.replace(MACHINE, processor=dataclasses.replace(MACHINE.processor, arithmetic=Arithmetic()))
    assert (MACHINE.is_calibrated, WITH_GPU.is_calibrated, described.is_calibrated) == (True, True, False)
    with pytest.raises(MachineError, match="bench describes no disk"):
        dataclasses.replace(described, disk=None).require_disk()


@pytest.mark.parametrize("value", ["wrong", {}, [1], 7])
def test_what_is_no_array_of_accelerators_is_named(value: object) -> None:
    with pytest.raises(MachineError, match=r"others is .* where an array of tables is expected"):
        machine_from_toml(edited(WITH_GPU, "others", value), origin="x")


def test_a_link_is_described_once() -> None:
    with pytest.raises(MachineError, match=r"links\.host stands beside processor\.copies"):
        machine_from_toml(edited(WITH_GPU, "links", {"host": {"rate": "1GB/s"}}), origin="x")


def test_the_curve_of_an_accelerator() -> None:
    found = ACCELERATOR.curve(compute_dtype="float16", stored_dtype="F16")
    assert found is ACCELERATOR.arithmetic.curves[1]
    assert found.flops == pytest.approx(7e14)
    assert found.weight_bytes_per_s == pytest.approx(4e12)
    widened = ACCELERATOR.curve(compute_dtype="float32", stored_dtype="BF16")
    assert widened.points[0].seconds_per_parameter == pytest.approx(1e-12 + (2 + 4) / 4e12)
    with pytest.raises(MachineError, match="NVIDIA H200 has no measurement of int8 products with BF16"):
        ACCELERATOR.curve(compute_dtype="int8", stored_dtype="BF16")


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
