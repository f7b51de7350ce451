"""Machines by name: counts, systems, near matches; and figures within physical bands."""

from __future__ import annotations

import tomllib
from importlib import resources

import pytest

from headrace.errors import MachineError
from headrace.machine.catalogue import find_machine, link_entries, processor_entries, system_names
from headrace.machine.machine_file import machine_from_toml, machine_to_toml
from headrace.machine.unit_text import read_number


def test_names_and_counts() -> None:
    assert find_machine("h100").num_devices == 1
    assert find_machine("8xh100").devices == 8
    four = find_machine("4x8xh100")
    assert (four.nodes, four.devices) == (4, 8)
    two = find_machine("16xh100")
    assert (two.nodes, two.devices) == (2, 8)
    assert "2 computers of 8" in two.notes[0]
    even = find_machine("20xh100")
    assert (even.nodes, even.devices) == (4, 5)
    assert "in place of" in find_machine("h100@dgx-2").notes[0]
    assert find_machine("7x16xv100-32@dgx-2").num_devices == 112
    assert find_machine("dgx-2").devices == 16
    assert find_machine("3xdgx-2").nodes == 3
    assert find_machine("4xv100-32@dgx-2").devices == 4
    assert find_machine("72xgb300").nodes == 1
    assert find_machine("6xrtx-3090").devices == 6
    assert find_machine("4xraspberry-pi-5").nodes == 4


@pytest.mark.parametrize(
    "name",
    [
        "H200_sxm",
        "RTX 3090",
        "NVIDIA GeForce RTX 2080",
        "rtx4090",
        "M2 Ultra",
        "apple-m4-pro",
        "A6000",
        "AMD MI300X",
        "NVIDIA A100-SXM4-80GB",
        "tpuv4",
    ],
)
def test_a_name_may_be_written_in_many_ways(name: str) -> None:
    assert find_machine(name).num_devices == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no machine"),
        ("8x", "names no machine"),
        ("0xh100", "no number of devices"),
        ("-1xh100", "no number of devices"),
        ("1.5xh100", "no number of devices"),
        ("100000000xh100", "no number of devices"),
        ("1000000x8xh100", "more than 1,000,000"),
        ("2x3x4xh100", "3 counts"),
        ("h1000", "did you mean h100"),
        ("zzzzzzz", "headrace machines"),
        ("4xv100-32@dgx-9", "did you mean dgx-2"),
        ("missing.toml", "does not exist"),
        ("2x4xdgx-2", "whole computer"),
        ("8xh100@", "no computer behind the @"),
        ("cpu@dgx-2", "no processor"),
        ("100xv100-32@dgx-2", "7x16xv100-32@dgx-2"),
        ("1009xh100", "1008 or 1016"),
        ("h" * 5000, "no machine"),
        ("~nobody-of-this-name/x", "no machine"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(MachineError, match=message):
        find_machine(text)


def test_devices_share_what_they_load_over() -> None:
    machine = find_machine("dgx-2")
    alone = machine.rate("host", sharers=1).expected
    assert alone == pytest.approx(12e9)
    assert 8e9 < machine.rate("host", sharers=4).expected < alone
    assert machine.rate("host", sharers=16).expected == pytest.approx(40e9 / 16)


@pytest.mark.parametrize("entry", processor_entries(), ids=lambda entry: entry.processor.name)
def test_every_processor_is_physically_plausible_and_has_a_source(entry: object) -> None:
    """Bits taken for bytes, or tera for giga, leave these bands."""
    from headrace.machine.catalogue import ProcessorEntry

    assert isinstance(entry, ProcessorEntry)
    processor = entry.processor
    assert entry.source
    assert 4e9 <= processor.memory_bytes <= 1e12
    assert 60e9 <= processor.memory_bytes_per_s.expected <= 25e12
    seconds_to_read_all = processor.memory_bytes / processor.memory_bytes_per_s.expected
    assert 0.01 < seconds_to_read_all < 0.7
    flops = processor.flops["bf16"].expected
    assert 20 < flops / processor.memory_bytes_per_s.expected < 600, "operations per byte"
    for name in ("fp8", "int8"):
        if name in processor.flops:
            assert 1 <= processor.flops[name].expected / flops <= 4.1
    assert 0.3 < processor.achievable.low <= processor.achievable.high <= 1
    if processor.power_w is not None:
        assert 1e10 < flops / processor.power_w.expected < 1e13, "operations per joule"
    if processor.rent_usd_per_h is not None:
        assert 0.1 < processor.rent_usd_per_h.expected < 20
    if processor.price_usd is not None:
        assert 500 < processor.price_usd.expected < 100_000
    if entry.host_link is not None:
        assert 5e9 < entry.host_link.expected < 500e9


def test_every_link_carries_no_more_than_its_nominal_rate() -> None:
    written = tomllib.loads(resources.files("headrace.machine").joinpath("links.toml").read_text("utf-8"))["link"]
    assert len(written) >= 40
    for entry, raw in zip(link_entries(), written, strict=True):
        nominal = read_number(raw["nominal"], "rate", field=entry.name)
        assert 0 < entry.rate.low <= entry.rate.expected <= entry.rate.high <= nominal * 1.0001
        assert entry.rate.source


def test_anchors() -> None:
    """Figures that everybody in the field knows."""
    assert find_machine("h100").processor.memory_bytes_per_s.expected == 3.35e12
    assert find_machine("a100-80").processor.flops["bf16"].expected == 312e12
    assert find_machine("v100").processor.memory_bytes == 32e9
    assert find_machine("h200").links["host"].bytes_per_s.expected == pytest.approx(52e9)
    assert find_machine("8xh100").links["scale_up"].bytes_per_s.expected < 450e9


def test_every_machine_survives_the_way_to_a_file_and_back() -> None:
    names = [entry.aliases[0] for entry in processor_entries()]
    for text in [*names, *(f"8x{name}" for name in names), *system_names()]:
        machine = find_machine(text)
        assert machine_from_toml(machine_to_toml(machine), origin="here") == machine
