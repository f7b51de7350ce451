"""How other work on the machine is told from own, on made-up counters of the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.streaming.pressure import MOST_SHARE, NOTED_SHARE, QUIET_S, Moment, Pressure, PressureGauge


class Kernel:
    """Counters of a machine with four CPUs; time passes where a test says so."""

    def __init__(self, *, psi: bool = True) -> None:
        waits_s = 0.0 if psi else None
        self.now = Moment(100.0, 50.0, 400.0, 3.0, waits_s, waits_s)

    def passes(
        self, seconds: float, *, own: float = 0.0, others: float = 0.0, disk: float = 0.0, memory: float = 0.0
    ) -> None:
        """CPUs that work for this process and for others; shares of the time in which any task waits."""
        now = self.now
        self.now = Moment(
            now.now_s + seconds,
            now.busy_s + seconds * (own + others),
            now.all_s + 4 * seconds,
            now.own_s + seconds * own,
            None if now.disk_waits_s is None else now.disk_waits_s + seconds * disk,
            None if now.memory_waits_s is None else now.memory_waits_s + seconds * memory,
            now.blocked,
        )

    def gauge(self, **asleep: float) -> PressureGauge:
        """A gauge that finds, whenever this process sleeps, what `asleep` says of others."""
        return PressureGauge(lambda: self.now, lambda seconds: self.passes(seconds, **asleep))


def test_own_work_is_none_of_others() -> None:
    kernel = Kernel()
    gauge = kernel.gauge()
    kernel.passes(2.0, own=4.0, disk=1.0, memory=1.0)
    assert gauge.pressure() == pytest.approx((0.0, 0.0, 0.0))


@given(own=st.floats(0, 2), others=st.floats(0, 2))
def test_of_the_cpus_it_is_what_own_work_does_not_explain(own: float, others: float) -> None:
    kernel = Kernel()
    gauge = kernel.gauge(others=others)
    kernel.passes(3.0, own=own, others=others)
    assert gauge.pressure().cpu == pytest.approx(others / 4, abs=1e-9)


def test_of_disk_and_memory_only_quiet_moments_count() -> None:
    kernel = Kernel()
    gauge = kernel.gauge(disk=0.4, memory=0.3)
    kernel.passes(3.0, own=2.0, disk=1.0, memory=1.0)
    assert gauge.pressure() == pytest.approx((0.0, 0.4, 0.3))


@pytest.mark.parametrize("shares", [(0.9, 0.05), (0.05, 0.9)])
def test_others_that_wait_at_one_end_only_do_not_count(shares: tuple[float, float]) -> None:
    kernel, coming = Kernel(), iter(shares)
    gauge = PressureGauge(lambda: kernel.now, lambda seconds: kernel.passes(seconds, disk=next(coming)))
    kernel.passes(3.0, own=2.0, disk=1.0)
    assert gauge.pressure().disk == pytest.approx(0.05)


@pytest.mark.parametrize("blocked", [False, True])
def test_without_pressure_to_read_blocked_tasks_tell_of_the_disk(blocked: bool) -> None:
    kernel = Kernel(psi=False)
    kernel.now = kernel.now._replace(blocked=blocked)
    assert kernel.gauge().pressure() == (0.0, float(blocked), 0.0)


def test_a_clock_that_stands_still_tells_nothing() -> None:
    assert PressureGauge(lambda: Kernel().now, lambda _: None).pressure() == (0.0, 0.0, 0.0)


def test_it_sleeps_twice_and_no_longer_than_it_says() -> None:
    kernel, slept = Kernel(), list[float]()
    PressureGauge(lambda: kernel.now, slept.append).pressure()
    assert slept == [QUIET_S, QUIET_S]


# -- what it means -----------------------------------------------------------------------------------------------------


def test_a_quiet_machine_is_not_noted() -> None:
    below = Pressure(cpu=NOTED_SHARE - 0.001, disk=0.05)
    assert (below.busy, below.notes()) == (0.0, ())


def test_a_busy_one_is_with_what_it_does_to_predictions() -> None:
    pressure = Pressure(cpu=0.5, disk=0.2, memory=0.05)
    assert pressure.busy == 0.5
    (note,) = pressure.notes()
    assert note == (
        "the CPU was busy with other work for 50% of the measurement, other work waited for the disk for 20% of the "
        "measurement; predictions may be off by a factor of 2: close other programs and measure again"
    )
    assert Pressure(cpu=1.0).busy == MOST_SHARE
    assert "factor of 10:" in Pressure(memory=1.0).notes()[0]


# -- the kernel's files ------------------------------------------------------------------------------------------------


def proc(path: Path, *, io: str | None, blocked: int) -> Path:
    (path / "pressure").mkdir()
    if io is not None:
        (path / "pressure" / "io").write_text(f"some avg10=1.00 avg60=2.00 avg300=3.00 total={io}\nfull total=7\n")
        (path / "pressure" / "memory").write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=250000\n")
    (path / "stat").write_text(f"cpu  1 2 3 4\nprocs_running 3\nprocs_blocked {blocked}\n")
    return path


def test_stalls_are_read_in_microseconds(tmp_path: Path) -> None:
    found = Moment.read(proc(tmp_path, io="1500000", blocked=0))
    assert (found.disk_waits_s, found.memory_waits_s, found.blocked) == (1.5, 0.25, False)


def test_files_that_are_not_there_or_make_no_sense_are_not_read(tmp_path: Path) -> None:
    found = Moment.read(proc(tmp_path, io=None, blocked=2))
    assert (found.disk_waits_s, found.memory_waits_s, found.blocked) == (None, None, True)
    (tmp_path / "pressure" / "io").write_text("nothing\n")
    assert Moment.read(tmp_path).disk_waits_s is None
    assert not Moment.read(tmp_path / "missing").blocked


def test_this_machine_has_counters_that_grow_with_own_work() -> None:
    before = after = Moment.read()
    while after.busy_s == before.busy_s and after.own_s < before.own_s + 5:
        after = Moment.read()
    assert after.own_s > before.own_s
    assert 0 < after.busy_s - before.busy_s <= after.all_s - before.all_s + 1e-6
