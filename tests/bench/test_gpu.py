"""The GPU benchmark on a made-up accelerator: every part measured or skipped and why, nothing lost, goals judged."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

import bench_report
import gpu
import headrace
from accelerator_machine import make_up
from gpu_parts.case import FAKE
from gpu_parts.checkpoint_rack import CheckpointRack
from gpu_parts.deadline import Deadline
from gpu_parts.made_up_machine import made_up_machine
from gpu_parts.outcome import Goal, Measured, Outcome, SkippedError, State, Table, at_least, holds
from gpu_parts.overlap import break_even_goals, crossing, efficiency_goals, token_counts
from gpu_parts.parts import PARTS, Part
from gpu_parts.raw_link import raw_link
from gpu_parts.report import exit_code, goals_of, record_of, report_text
from gpu_parts.stage import Promise, Stage, single_tokens
from gpu_parts.timing import cycles_s
from headrace.inference import assembly
from headrace.model.safetensors_index import TensorIndex
from headrace.planning.plan import Placement
from headrace.streaming.device import CopyPart
from headrace.streaming.fakes.accelerator import FakeAccelerator
from make_checkpoint import SHAPES, Shape, checkpoint_bytes, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TINY = Shape(64, 160, 3, 4, 2, 512)
NEED_A_GPU = {"rivals", "compiled"}
NOT_THERE = ("tomli_w", "typer", "gguf", "matplotlib")
"""what may be missing where the benchmark runs"""


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    """Products are tiny, and threads would wait for one another; what was imported is not looked through as garbage."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


def run_fake(out: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run in this process; the exit code and what was written."""
    code = gpu.main(["--device", "fake", "--out", str(out), *arguments])
    return code, json.loads((out / "gpu-fake.json").read_text()), (out / "gpu-fake.md").read_text()


def make_stage(tmp_path: Path, device: FakeAccelerator | None = None) -> Stage:
    device = device or FakeAccelerator()
    return Stage(device, FAKE, CheckpointRack(tmp_path, FAKE.shapes), Deadline(600.0), made_up_machine(device))


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_one_command_measures_every_part_or_says_why_not(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({NOT_THERE!r}))\n")
    path = os.pathsep.join((str(ROOT / "src"), str(tmp_path)))
    command = [sys.executable, "bench/gpu.py", "--device", "fake", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--dir", str(tmp_path / "checkpoints")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "gpu-fake.json").read_text())
    text = (tmp_path / "out" / "gpu-fake.md").read_text()
    assert list(record["parts"]) == [part.name for part in PARTS]
    for part in PARTS:
        found = record["parts"][part.name]
        assert f"## {part.title} (`{part.name}`" in text
        if part.name in NEED_A_GPU:
            assert found["state"] == "skipped"
            assert "needs a GPU" in found["reason"]
            assert found["reason"] in text
        else:
            assert found["state"] == "measured", found
    assert "These figures mean nothing" in text
    assert text.strip() in done.stdout
    assert list((tmp_path / "checkpoints").iterdir()) == [], "checkpoints are removed"

    exact = record["parts"]["exactness"]["comparisons"]
    assert {one["compared"] for one in exact} == {"resident", "from host memory", "half resident", "from the disk"}
    assert {one["blocks"] for one in exact} >= {"4 device", "4 host", "4 disk"}
    assert all(one["different"] == 0 and one["passes"] > 0 for one in exact)
    assert record["parts"]["link"]["blocks"] == {"device": 0, "host": 6, "disk": 0}
    assert record["parts"]["overlap"]["rows"][0]["tokens"] == 1
    assert record["parts"]["overlap"]["comparisons"][0]["blocks"] == "6 host"
    assert [row["blocks"]["device"] for row in record["parts"]["residency"]["rows"]] == [6, 3]
    assert record["parts"]["disk"]["streaming_bytes_per_s"]["median"] > 0
    assert record["parts"]["large"]["scaled_decode_s"] > record["parts"]["large"]["measured_decode_s"]["median"]
    assert record["promises"]
    assert all(one["kept"] and one["peak_bytes"] > 0 for one in record["promises"])
    reached = {goal["what"]: goal["reached"] for goal in record["goals"]}
    assert reached["logits of the tiny shape equal transformers' own, bit for bit"]
    assert reached["streamed logits of the little shape equal resident ones, bit for bit"]
    assert reached["peak of the device's memory within what each load was allowed"]


def test_only_the_parts_that_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_up(monkeypatch)
    code, record, _ = run_fake(tmp_path, "--parts", "link")
    assert code == 0
    assert list(record["parts"]) == ["link"]
    with pytest.raises(SystemExit) as refused:
        run_fake(tmp_path, "--parts", "link,everything")
    assert refused.value.code == 2


@pytest.mark.parametrize("device", ["cpu", "tpu"])
def test_a_device_that_cannot_be_measured(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        gpu.main(["--device", device, "--out", str(tmp_path)])
    assert refused.value.code == 2
    assert device in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_parts_for_which_no_time_is_left_say_so(tmp_path: Path) -> None:
    code, record, text = run_fake(tmp_path, "--seconds", "0")
    assert code == 0
    assert list(record["parts"]) == [part.name for part in PARTS]
    for found in record["parts"].values():
        assert found["state"] == "skipped"
        assert "0 s are left" in found["reason"]
        assert found["reason"] in text


def test_the_parts_that_need_a_gpu_run_as_far_as_the_processor_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_up(monkeypatch)
    monkeypatch.setattr(Stage, "require_gpu", lambda *_: None)
    asked_for: list[int] = []
    monkeypatch.setattr(assembly, "compile_layers", lambda layers, **_: asked_for.append(len(layers)))
    stage = make_stage(tmp_path)
    found = {part.name: part.run(stage) for part in PARTS if part.name in NEED_A_GPU}
    assert asked_for == [FAKE.shapes[FAKE.small].layers]
    assert found["rivals"].record["same_tokens"]
    assert set(found["rivals"].record["generation_s"]) >= {"headrace", "accelerate"}
    assert "accelerate" in found["rivals"].goals[0].what
    assert set(found["compiled"].record["decode_s"]) == {"as it is", "compiled"}


def measured(stage: Stage) -> Measured:
    """Something that takes no time."""
    return Measured(tables=[Table(("a",), [["b"]])], record={"found": 7})


def test_a_part_that_fails_loses_itself_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[list[str]] = []

    def fails(stage: Stage) -> Measured:
        written.append(sorted(path.name for path in tmp_path.iterdir()))
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def needs(seconds: float) -> Callable[[Stage], float]:
        return lambda stage: seconds

    monkeypatch.setattr(
        gpu,
        "PARTS",
        (
            Part("before", "Before", measured, needs(1)),
            Part("fails", "It fails", fails, needs(1)),
            Part("long", "Too long", measured, needs(1e6)),
            Part("after", "After", measured, needs(1)),
        ),
    )
    code, record, text = run_fake(tmp_path)
    assert code == 1
    assert {name: part["state"] for name, part in record["parts"].items()} == {
        "before": "measured",
        "fails": "failed",
        "long": "skipped",
        "after": "measured",
    }
    assert "illegal memory access" in record["parts"]["fails"]["reason"]
    assert "Failed: RuntimeError at test_gpu.py" in text
    assert "Traceback" in capsys.readouterr().err
    assert record["parts"]["before"]["found"] == record["parts"]["after"]["found"] == 7
    assert written == [["gpu-fake.json", "gpu-fake.md"]], "what was measured before is on the disk by then"


class Forgetful(FakeAccelerator):
    """Loses the first byte of every large copy."""

    def copy(self, parts: Sequence[CopyPart], **options: Any) -> Any:
        return super().copy([CopyPart(part.source[1:], part.target[1:]) for part in parts], **options)


def test_logits_that_are_not_exact_end_the_run_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_up(monkeypatch)
    monkeypatch.setattr(gpu, "FakeAccelerator", Forgetful)
    monkeypatch.setattr(gpu, "FAKE", replace(FAKE, dtypes=("bfloat16",)))
    code, record, text = run_fake(tmp_path, "--parts", "exactness")
    assert code == 1
    assert record["parts"]["exactness"]["state"] == "measured"
    assert any(one["different"] for one in record["parts"]["exactness"]["comparisons"])
    assert "**missed**" in text


# -- the clock --------------------------------------------------------------------------------------------------------


def test_rounds_end_where_another_one_would_not_fit() -> None:
    now = [100.0]
    deadline = Deadline(10.0, clock=lambda: now[0])
    numbers = []
    for number in deadline.rounds(9):
        numbers.append(number)
        now[0] += 3.0
    assert numbers == [0, 1, 2]
    assert deadline.left_s == pytest.approx(1.0)
    now[0] += 5.0
    assert list(deadline.rounds(4)) == [0], "one in any case, since something was prepared for it"
    assert list(Deadline(10.0).rounds(3)) == [0, 1, 2]


class At(NamedTuple):
    """An event of a device whose time is told."""

    time_s: float

    def wait(self) -> None:
        return

    def passed(self) -> bool:
        return True

    def moment_s(self) -> float:
        return self.time_s


def test_cycles_are_taken_from_end_to_end_and_the_first_pass_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    device, ends, passes = FakeAccelerator(), iter([7.0, 9.0, 9.5, 12.5]), itertools.count()
    monkeypatch.setattr(device, "computed", lambda: At(next(ends)))
    assert cycles_s(device, lambda: next(passes), 3) == pytest.approx([2.0, 0.5, 3.0])
    assert next(passes) == 4


def test_the_raw_link_is_timed_and_gives_its_memory_back() -> None:
    device = FakeAccelerator()
    with raw_link(device, 10_000) as raw:
        assert raw.pinned
        assert device.held_bytes() == 2 * 12288
        assert 0 < raw.bytes_per_s(5) < 1e15
        assert device.bytes_copied == 5 * 12288
        del raw
    assert device.held_bytes() == 0
    assert device.violations == []


# -- what is judged ---------------------------------------------------------------------------------------------------


def outcome(name: str, state: State, *goals: Goal) -> Outcome:
    found = Measured(goals=goals, record={}) if state is State.MEASURED else None
    return Outcome(name=name, title=name, state=state, seconds=1.0, reason="why", measured=found)


def test_goals_are_reached_or_missed_with_their_figures() -> None:
    goals = [at_least("link", 0.97, 0.981), at_least("overlap", 0.95, 0.913)]
    outcomes = [outcome("one", State.MEASURED, *goals), outcome("two", State.SKIPPED)]
    promises = [Promise("a load", 100, 100), Promise("another", 100, 101)]
    text = report_text("GPU", made_up=False, outcomes=outcomes, promises=promises)
    assert "| link | >= 0.97 | 0.981 | reached |" in text
    assert "| overlap | >= 0.95 | 0.913 | **missed** |" in text
    assert "| every load | 1 of 2 | **missed** |" in text
    assert "| 1.010 | **broken** |" in text
    assert "Skipped: why" in text
    assert "mean nothing" not in text
    record = record_of(outcomes, promises)
    assert [goal["reached"] for goal in record["goals"]] == [True, False, False]
    assert exit_code(outcomes, goals_of(outcomes, promises)) == 0, "a goal may be missed"


def test_what_must_hold_decides_the_exit_code() -> None:
    good = outcome("good", State.MEASURED, holds("exact", found="all", reached=True))
    bad = outcome("bad", State.MEASURED, holds("exact", found="some", reached=False))
    assert exit_code([good], goals_of([good], [])) == 0
    assert exit_code([bad], goals_of([bad], [])) == 1
    assert exit_code([good, outcome("x", State.FAILED)], []) == 1


def test_break_even_is_where_computing_crosses_loading() -> None:
    assert crossing({1: -1.0, 100: -0.5, 300: 0.5, 400: 2.0}) == pytest.approx(200.0)
    assert crossing({1: -1.0, 100: -0.5}) is None
    assert crossing({1: 0.5, 100: 1.0}) is None


def test_efficiency_is_judged_below_at_and_above_break_even() -> None:
    goals = efficiency_goals("8B", {1: 0.99, 100: 0.90, 190: 0.96, 400: 0.97}, 200.0)
    assert [(goal.found, goal.reached) for goal in goals] == [("0.900", False), ("0.960", True), ("0.970", True)]
    assert "(1, 100 tokens)" in goals[0].what
    only = efficiency_goals("8B", {1: 0.99, 100: 0.90}, None)
    assert [(goal.found, goal.reached) for goal in only] == [("0.900", False)]


def test_the_prediction_nearest_to_break_even_is_judged_and_that_of_a_single_token() -> None:
    near, single = break_even_goals("8B", {1: 5000.0, 8192: 10_900.0, 15_000: 12_000.0}, 10_000.0)
    assert (near.found, near.reached) == ("+9.0%", True)
    assert "8192 tokens" in near.what
    assert (single.found, single.reached) == ("-50.0%", False)
    assert [goal.reached for goal in break_even_goals("8B", {1: 5000.0}, None)] == [False]


def test_tokens_per_pass_lie_around_the_expected_break_even() -> None:
    counts = token_counts(10_000.0, (512, 20_000))
    assert counts == [1, 256, 2304, 4864, 9984, 14848]
    assert token_counts(1e6, (512, 20_000))[-1] == 19968, "no more than fit"
    assert token_counts(3.0, (512, 20_000)) == [1, 256, 512, 768], "and not none"
    assert token_counts(0.1, (16, 64)) == [1, 4, 8, 16, 24]


# -- what is loaded ---------------------------------------------------------------------------------------------------


class Lavish(FakeAccelerator):
    """Its allocator says that it held a little more than there is."""

    excess_bytes = 0

    def peak_bytes(self) -> int:
        return super().peak_bytes() + self.excess_bytes


def test_promises_are_held_against_the_allocator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_up(monkeypatch)
    device = Lavish()
    stage = make_stage(tmp_path, device)
    least = stage.least_bytes("tiny", "overlap")
    options: dict[str, Any] = {"memory": least, "strategy": "overlap"}
    with stage.load("tiny", what="alone", **options) as model:
        assert model.headrace.plan.budget_bytes == least
    device.excess_bytes = least
    with stage.load("tiny", what="too much", **options):
        pass
    with stage.load("tiny", what="first", **options), stage.load("tiny", what="second", **options):
        pass
    with stage.load("tiny", what="uncounted", counted=False, **options):
        pass
    assert [(one.what, one.budget_bytes, one.kept) for one in stage.promises] == [
        ("tiny alone", least, True),
        ("tiny too much", least, False),
        ("tiny first with tiny second", 2 * least, True),
    ]
    assert device.held_bytes() == 0


def test_memory_for_a_share_of_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_up(monkeypatch)
    stage = make_stage(tmp_path)
    kept = []
    for share in (0.0, 0.5, 1.0):
        with stage.load("little", what="", memory=stage.share_bytes("little", share), strategy="overlap") as model:
            kept.append(model.headrace.plan.placements.count(Placement.DEVICE))
    assert kept[0] < kept[1] < kept[2] < 6
    with stage.load("little", what="", memory=stage.resident_bytes("little"), strategy="resident") as model:
        assert model.headrace.plan.embedding.value == "resident"


def test_the_most_tokens_fit_the_device(tmp_path: Path) -> None:
    stage = make_stage(tmp_path)
    assert stage.most_tokens("tiny") == FAKE.token_bounds[1]
    beside = stage.resident_bytes("tiny", **single_tokens(1))
    needed = beside + stage.least_bytes("tiny", "overlap", **single_tokens(40))
    small = make_stage(tmp_path, FakeAccelerator(memory_bytes=int(needed / 0.9)))
    most = small.most_tokens("tiny")
    assert 36 <= most <= 40
    assert beside + small.least_bytes("tiny", "overlap", **single_tokens(most)) <= needed
    assert make_stage(tmp_path, FakeAccelerator(memory_bytes=1000)).most_tokens("tiny") == FAKE.token_bounds[0]


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fast") / "checkpoint"
    total = write_checkpoint(directory, TINY, shard_bytes=200_000, seed=0, fast=True)
    assert total == checkpoint_bytes(TINY)
    return directory


def test_a_fast_checkpoint_lies_on_disk_as_a_slow_one_does(written: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY, shard_bytes=200_000, seed=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written.iterdir())
    assert (written / "model-00002-of-00002.safetensors").exists()
    slow, fast = TensorIndex.from_directory(tmp_path), TensorIndex.from_directory(written)
    assert dict(slow.entries) == dict(fast.entries)
    for slow_file, fast_file in zip(slow.files, fast.files, strict=True):
        assert slow_file.path.read_bytes() != fast_file.path.read_bytes()


def test_fast_weights_are_random_and_no_two_tensors_the_same(written: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(written, dtype=torch.bfloat16)
    seen: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().float()
        if "norm" in name:
            assert values.mean().item() == pytest.approx(1.0, abs=0.02)
        else:
            assert values.mean().item() == pytest.approx(0.0, abs=0.002)
            assert values.std().item() == pytest.approx(0.02, rel=0.05)
            assert len(torch.unique(values, dim=0)) == len(values), f"{name} repeats a row"
        for other in seen.setdefault(tuple(values.shape), []):
            assert (values != other).float().mean() > 0.7, f"{name} is another tensor again"
        seen[tuple(values.shape)].append(values)


def test_a_fast_checkpoint_runs_and_its_logits_are_finite(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_up(monkeypatch)
    ids = torch.randint(3, 512, (2, 9), generator=torch.Generator().manual_seed(0))
    reference = AutoModelForCausalLM.from_pretrained(written, dtype=torch.bfloat16)
    options: dict[str, Any] = {"memory": 200_000_000, "host_memory": 100_000_000, "max_tokens": 16, "prompt_tokens": 9}
    with (
        torch.inference_mode(),
        headrace.load(written, device=FakeAccelerator(), strategy="overlap", batch=2, **options) as model,
    ):
        logits = model(input_ids=ids).logits
        assert torch.isfinite(logits).all()
        assert logits.float().std() > 0.01, "weights of a sane size make a difference"
        assert torch.equal(logits, reference(input_ids=ids).logits)


def test_the_shapes_are_those_of_the_models() -> None:
    billions = {name: checkpoint_bytes(SHAPES[name]) / 2e9 for name in ("llama-1b", "llama-8b", "llama-70b")}
    assert billions == pytest.approx({"llama-1b": 1.498, "llama-8b": 8.030, "llama-70b": 70.55}, rel=1e-3)
    assert SHAPES["llama-1b"].hidden // SHAPES["llama-1b"].heads == 64


def test_a_rack_writes_once_and_removes_what_it_wrote(tmp_path: Path) -> None:
    rack = CheckpointRack(tmp_path, FAKE.shapes)
    assert rack.seconds("tiny", loads=0) > 0
    path = rack.path("tiny")
    assert rack.seconds("tiny", loads=0) == 0, "it is there"
    assert rack.write_bytes_per_s != 1e9
    assert rack.read_bytes_per_s != 1e9
    before = path.stat().st_mtime_ns
    assert CheckpointRack(tmp_path, FAKE.shapes).path("tiny") == path
    assert path.stat().st_mtime_ns == before
    rack.clear()
    assert not path.exists()


def test_a_large_model_is_cut_to_what_fits(tmp_path: Path) -> None:
    name = FAKE.large
    assert name is not None
    rack = CheckpointRack(tmp_path, FAKE.shapes)
    layers = rack.cut(name, most_bytes=3_000_000)
    assert 2 <= layers < 80
    assert rack.size_bytes(name) <= 3_000_000 < checkpoint_bytes(rack.shape(name)._replace(layers=layers + 1))
    path = rack.path(name)
    config = json.loads((path / "config.json").read_text())
    assert config["num_hidden_layers"] == layers
    later = CheckpointRack(tmp_path, FAKE.shapes)
    assert later.cut(name, most_bytes=1) == layers, "one that is there is used"
    assert later.path(name) == path
    with pytest.raises(SkippedError, match="two layers of it take"):
        CheckpointRack(tmp_path / "elsewhere", FAKE.shapes).cut(name, most_bytes=500_000)


# -- where a result comes from ----------------------------------------------------------------------------------------


def test_a_checkout_without_git_has_no_commit_and_still_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_report.provenance()["commit"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench_report.provenance()["commit"] == ""
    bench_report.write("x", {"a": 1}, "text", out=tmp_path, show=False)
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "x.json").read_text())["a"] == 1
    code, _, text = run_fake(tmp_path, "--seconds", "0", "--commit", "abc1234")
    assert code == 0
    assert "commit abc1234" in text.splitlines()[0]
