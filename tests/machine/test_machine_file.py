"""Machine files: units are required, and whatever is wrong is named."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from pathlib import Path

import pytest

from headrace.cli.main import main
from headrace.errors import MachineError
from headrace.machine.catalogue import find_machine
from headrace.machine.machine import Tier
from headrace.machine.machine_file import load_machine, machine_from_toml, machine_to_toml
from headrace.machine.measured import measured_accelerator
from headrace.machine.unit_text import read_number, read_quantity, write_number
from machine.test_measured_machine import ACCELERATOR, CURVE, MACHINE, WITH_GPU
from measured_machines import arithmetic, computer

GOOD = """
name = "two cards"
devices = 2

[processor]
name = "card"
kind = "gpu"
memory = "24GB"
memory_rate = "936GB/s"
achievable = 0.7
rent = "0.3USD/h"
[processor.flops]
bf16 = "71TFLOPS"

[host]
memory = "128GiB"
memory_rate = { expected = "60GB/s", low = "45GB/s", high = "76GB/s", source = "measured" }
flops = "1TFLOPS"

[links.host]
rate = "24GB/s"
latency = "10us"
uplink = "bridge"
[links.bridge]
rate = "30GB/s"
[disk]
rate = "7GB/s"
"""


def test_a_byte_order_mark_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(GOOD, encoding="utf-8-sig")
    assert load_machine(path) == machine_from_toml(GOOD, origin=str(path))


def test_a_description_may_come_through_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(GOOD,))
    writer.start()
    assert find_machine(str(pipe)) == machine_from_toml(GOOD, origin=str(pipe))
    writer.join()


def test_a_good_file_is_read() -> None:
    machine = machine_from_toml(GOOD, origin="good.toml")
    assert machine.devices == 2
    assert machine.processor.memory_bytes == 24e9
    assert machine.processor.flops["bf16"].expected == 71e12
    assert machine.host is not None
    assert machine.host.memory_bytes == 128 * 2**30
    assert machine.host.memory_bytes_per_s.low == 45e9
    assert machine.host.memory_bytes_per_s.source == "measured"
    assert machine.links["host"].latency_s.expected == pytest.approx(1e-5)
    assert machine.rate("host", sharers=2).expected == 15e9
    assert machine_from_toml(machine_to_toml(machine), origin="again") == machine


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('memory = "24GB"', "memory = 24", r'processor.memory is 24, without a unit; write .* "80GB"'),
        ('memory = "24GB"', 'memory = "24"', "without a unit"),
        ('"936GB/s"', '"936Gb/s"', "bits are not accepted"),
        ('"936GB/s"', '"936Gbit/s"', "bits are not accepted"),
        ('"936GB/s"', '"936GB"', "unknown unit 'GB'; did you mean"),
        ('"936GB/s"', '"-936GB/s"', "a number from 0 on"),
        ('"936GB/s"', '"0GB/s"', "memory_rate is zero"),
        ('rate = "7GB/s"', 'rate = "0GB/s"', "disk.rate is zero"),
        ('"71TFLOPS"', '"71TFLOP"', "did you mean"),
        ('"24GB"', '"1e30GB"', "beyond all machines"),
        ("devices = 2", "devices = 0", "a whole number from 1"),
        ("devices = 2", "devices = -2", "a whole number from 1"),
        ("devices = 2", "devces = 2", "did you mean devices"),
        ('kind = "gpu"', 'kind = "gpus"', "did you mean gpu"),
        ('name = "card"', "", "processor.name is missing"),
        ("achievable = 0.7", "achievable = 1.7", "up to 1"),
        ('rate = "30GB/s"', 'rate = "30GB/s"\nuplink = "host"', "go round in a circle: host -> bridge -> host"),
        ('uplink = "bridge"', 'uplink = "brigde"', "the uplink 'brigde' of 'host' is not described"),
        ('low = "45GB/s"', 'low = "65GB/s"', "low <= expected <= high"),
        ('expected = "60GB/s", ', "", "expected is missing"),
        ("[links.bridge]", "[links.bridge", "not even TOML"),
        ('bf16 = "71TFLOPS"', "", "flops is empty"),
        ('bf16 = "71TFLOPS"', 'bf61 = "71TFLOPS"', "did you mean bf16"),
        ('bf16 = "71TFLOPS"', 'int8 = "71TFLOPS"', "no 16- or 32-bit"),
        ("devices = 2", 'devices = 2\nnotes = "one"', "array of texts"),
        ("devices = 2", "devices = 2000\nnodes = 2000", "more than 1,000,000"),
        ("[links.bridge]", "[links.brige]", "the uplink 'bridge' of 'host' is not described"),
        ("[links.host]", "[links.hosts]", "did you mean host"),
        ("[disk]", "[dsk]", "did you mean disk"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(MachineError, match=message) as caught:
        machine_from_toml(GOOD.replace(old, new, 1), origin="bad.toml")
    assert "bad.toml" in str(caught.value)


def test_a_link_to_itself_is_a_circle() -> None:
    text = GOOD.replace('rate = "30GB/s"', 'rate = "30GB/s"\nuplink = "bridge"')
    with pytest.raises(MachineError, match="circle"):
        machine_from_toml(text, origin="bad.toml")


def test_a_file_is_found_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    assert find_machine(str(path)).name == "two cards"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(MachineError, match="cannot be read"):
        find_machine(str(path))


def test_a_measured_cpu_computes_as_fast_as_its_curves() -> None:
    processor = MACHINE.processor
    assert (processor.kind, MACHINE.host, dict(MACHINE.links)) == ("cpu", None, {})
    point = CURVE.points[-1]
    assert processor.flops["bf16"].expected == pytest.approx(2 * point.tokens / point.seconds_per_parameter)
    assert "in float32" in processor.flops["bf16"].source
    assert processor.memory_bytes_per_s.expected == pytest.approx(2 / 1e-9)  # products of one token: 2 bytes each
    assert computer([CURVE], copied_bytes_per_s=9e10).processor.memory_bytes_per_s.expected == 9e10


def test_a_measured_accelerator_computes_and_the_computer_around_it_feeds_it() -> None:
    processor, host = WITH_GPU.processor, WITH_GPU.host
    assert (processor.name, processor.kind, processor.memory_bytes) == ("NVIDIA H200", "gpu", 150e9)
    assert processor.memory_bytes_per_s.expected == 4e12
    assert processor.flops["bf16"].expected == pytest.approx(7e14)  # 16 bits, in the dtype that is faster here
    assert "float16" in processor.flops["bf16"].source
    assert processor.flops["fp32"].expected == pytest.approx(5e13)
    assert host is not None
    assert (host.memory_bytes, WITH_GPU.host_bytes) == (1 << 33, 1 << 33)
    assert host.flops.expected == pytest.approx(CURVE.flops)
    link = WITH_GPU.links["host"]
    assert (link.bytes_per_s.expected, link.latency_s.expected) == (5e10, 2e-5)
    assert link.bytes_per_s.low == 4.2e10  # while it computes
    assert (WITH_GPU.devices, WITH_GPU.notes) == (1, ())
    for tier in Tier:
        assert WITH_GPU.usable_bytes(tier) > 0


def test_of_several_accelerators_the_first_is_planned_for_and_a_note_says_so() -> None:
    second = dataclasses.replace(ACCELERATOR, device="cuda:1", name="NVIDIA T4")
    made = computer([CURVE], second, ACCELERATOR).on("auto", origin="x")
    assert (made.processor.name, made.devices) == ("NVIDIA T4", 1)
    assert made.notes == ("planned for cuda:1 alone; --device names another of the 2 that were measured",)


def test_an_accelerator_without_arithmetic_is_refused() -> None:
    eight_bits = dataclasses.replace(ACCELERATOR.arithmetic.curves[0], compute_dtype="int8")
    assert ACCELERATOR.copies is not None
    with pytest.raises(MachineError, match="NVIDIA H200 has no measurement of 16- or 32-bit arithmetic"):
        measured_accelerator(
            name="NVIDIA H200",
            device="cuda:0",
            memory_bytes=1e9,
            free_bytes=1e9,
            copied_bytes_per_s=1e9,
            arithmetic=arithmetic([eight_bits]),
            copies=ACCELERATOR.copies,
        )


def test_a_model_larger_than_the_gpu_is_planned_over_its_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of GPT-3's 350 GB at most 150 stay on the device; the rest comes from the host's memory, which has the room."""
    path = tmp_path / "machine.toml"
    path.write_text(machine_to_toml(computer([CURVE], ACCELERATOR, memory_bytes=10**12)))
    assert main(["plan", "gpt-3", "--machine", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["processor"] == "NVIDIA H200"
    strategies = {item["name"]: item for item in report["strategies"]}
    assert not strategies["resident"]["fits"]
    overlap = strategies["overlap"]
    assert overlap["fits"]
    assert overlap["weights_from"] == "host"
    assert overlap["binds"] == "link"
    assert overlap["memory_bytes"]["host"] > 200e9
    # At least the bytes that do not fit, at the link's measured rate.
    assert overlap["decode_s_per_pass"] > (350e9 - 150e9) / 5e10
    assert overlap["decode_s_per_pass"] < 350e9 / 4.2e10


def test_units_mean_what_they_say() -> None:
    assert read_number("1GiB", "size", field="x") == 2**30
    assert read_number("1GB", "size", field="x") == 10**9
    assert read_number("2.5us", "time", field="x") == pytest.approx(2.5e-6)
    assert read_quantity("1.5kW", "power", field="x", source="s").expected == 1500
    assert write_number(936e9, "rate") == "936GB/s"
    assert write_number(8.4e-11, "time") == "84ps"
    assert write_number(71e12, "flops") == "71TFLOPS"
    for number in (0.0, 1.0, 0.1, 1 / 3, 7.3e-6, 123456789.123, 8.4e-11, 3e-18):
        assert read_number(write_number(number, "time"), "time", field="x") == number


def test_what_others_had_of_the_machine_while_it_was_measured_is_kept() -> None:
    busy = dataclasses.replace(MACHINE, busy=0.375, notes=("the CPU was busy",))
    assert machine_from_toml(machine_to_toml(busy), origin="busy.toml") == busy
    assert "busy" not in machine_to_toml(MACHINE)


@pytest.mark.parametrize(("share", "told"), [("1.0", "below 1"), ('"often"', "busy is 'often'"), ("-0.1", "busy is")])
def test_a_share_that_is_none_is_refused(share: str, told: str) -> None:
    with pytest.raises(MachineError, match=told):
        machine_from_toml(f"busy = {share}\n{GOOD}", origin="busy.toml")
