"""`headrace plan` for a computer with an accelerator: measured here, or by its machine file and then without torch."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import headrace
from accelerator_machine import ACCELERATOR, TIMED_LAYER, make_up
from headrace.accuracy import history_file
from headrace.accuracy.history import RunRecord
from headrace.cli.main import main
from headrace.errors import BudgetError, InvalidRequestError, MachineError
from headrace.inference import api, calibration
from headrace.inference.layer_timing import TimedLayer
from headrace.inference.plan_api import plan_answer
from headrace.machine.compute_curve import ComputeCurve, CurvePoint
from headrace.machine.machine import Machine, Processor
from headrace.machine.machine_file import machine_to_toml
from headrace.model.config_fields import read_config
from headrace.model.layout import align_up
from headrace.model.safetensors_index import TensorIndex
from headrace.model.stored_model import build_stored_model
from headrace.planning.advice import advice, more_memory
from headrace.planning.answer import PlanAnswer
from headrace.planning.break_even import BreakEven, break_even
from headrace.planning.infeasible import budget_for_everything, minimum_bytes
from headrace.planning.measured_rates import accelerator_rates, cpu_layer_times
from headrace.planning.memory import MemoryAccount
from headrace.planning.plan import Arrangement, Placement
from headrace.planning.planner import compare, plan_fastest, plan_strategy, recommended
from headrace.planning.prediction import Candidate, predict
from headrace.planning.scenario import Scenario
from headrace.planning.scenarios import PlanRequest
from headrace.planning.strategies import Strategy
from headrace.planning.workload import Workload
from headrace.streaming import device_budget
from headrace.streaming.device import CpuDevice, Device
from headrace.streaming.fakes.accelerator import FakeAccelerator
from headrace.streaming.probe import machine as machine_probe
from headrace.units import format_seconds, parse_size
from make_checkpoint import Shape, write_checkpoint
from measured_machines import arithmetic, computer, exact, with_copies, with_unmeasured_cpu

SHAPE = Shape(hidden=256, intermediate=704, layers=12, heads=4, kv_heads=2, vocabulary=512)
LAYER_PARAMETERS = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 704
LAYER_BYTES = 2 * LAYER_PARAMETERS + 2 * 2 * 256
"""one layer's matrices and norms, in bfloat16"""
WORK = ("--prompt-tokens", "8", "--generate-tokens", "8")
WORKLOAD = Workload(sequences=1, prompt_tokens=8, generate_tokens=8)
CURVES = tuple(
    ComputeCurve(compute_dtype=name, stored_dtype="BF16", points=(CurvePoint(1, 4e-9), CurvePoint(64, 6e-8)))
    for name in ("bfloat16", "float32")
)
FIRST = dataclasses.replace(ACCELERATOR, name="Made-up 1", device="cuda:0", memory_bytes=10**10, free_bytes=8 * 10**9)
SECOND = with_copies(dataclasses.replace(FIRST, name="Made-up 2", device="cuda:1"), while_computing_bytes_per_s=5e7)


def machine(*accelerators: Processor, curves: Sequence[ComputeCurve] = CURVES, **changes: Any) -> Machine:
    """Return a computer whose disk does 100 MB/s, and whose processor is slow but for one token."""
    own = {"read_bytes_per_s": 1e8, "block_overhead_s": 0.0, "pass_overhead_s": 1e-5, **changes}
    made = computer(curves, *(accelerators or (FIRST, SECOND)), name="made up", memory_bytes=64 << 30, **own)
    return with_host_memory(made, 2e8)


def with_host_memory(made: Machine, bytes_per_s: float) -> Machine:
    assert made.host is not None
    return dataclasses.replace(made, host=dataclasses.replace(made.host, memory_bytes_per_s=exact(bytes_per_s)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "twelve"
    write_checkpoint(directory, SHAPE, shard_bytes=1_000_000_000, seed=0)
    return directory


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "machine.toml"
    path.write_text(machine_to_toml(machine()))
    return path


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeAccelerator:
    """What `--device cuda` and auto open; its speeds are made up."""
    made = FakeAccelerator(memory_bytes=1 << 30)
    open_as(monkeypatch, made)
    make_up(monkeypatch)
    return made


def open_as(monkeypatch: pytest.MonkeyPatch, made: FakeAccelerator) -> None:
    monkeypatch.setattr(api, "open_device", lambda asked: CpuDevice() if asked == "cpu" else made)


@cache
def beside_bytes(model: Path) -> int:
    """Bytes of the device that are held whichever layers stay: head, cache, activations, what its libraries keep."""
    spec = build_stored_model(
        "twelve", read_config(model / "config.json"), TensorIndex.from_directory(model), cut_head=False
    )
    scenario = Scenario(
        model=spec, workload=WORKLOAD, compute_dtype="bfloat16", budget_bytes=0, host_budget_bytes=0, device="cuda:0"
    )
    arrangement = Arrangement((*[Placement.DISK] * 12, Placement.DEVICE), 0)
    return MemoryAccount(scenario).device(arrangement).total_bytes


def on_device(model: Path, layers: int) -> str:
    """So many layers' bytes of the device beside what is held anyhow, and half a layer's, as an option."""
    return f"{beside_bytes(model) + layers * LAYER_BYTES + LAYER_BYTES // 2}B"


def on_host(layers: int) -> str:
    """So many layers' bytes of the host beside the ring, and half a layer's."""
    return f"{(64 << 20) + layers * align_up(LAYER_BYTES) + LAYER_BYTES // 2}B"


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def json_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    report: dict[str, Any] = json.loads(out)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    return report


def fitting(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in report["strategies"] if item["fits"]}


def answer_of(model: Path, made: Machine | None = None, **options: Any) -> PlanAnswer:
    asked: dict[str, Any] = {"memory": on_device(model, 5), "host_memory": on_host(40), **options}
    request = PlanRequest(prompt_tokens=8, generate_tokens=8, **asked)
    return plan_answer(model, machine=made or machine(), request=request)


def scenario_of(model: Path, made: Machine | None = None, **options: Any) -> Scenario:
    return answer_of(model, made, **options).scenario


def best_of(scenario: Scenario) -> Candidate:
    best = recommended(compare(scenario))
    assert best is not None
    return best


def break_even_of(scenario: Scenario, best: Candidate) -> BreakEven:
    even = break_even(scenario, best)
    assert even is not None
    return even


def advice_on(scenario: Scenario, best: Candidate) -> str:
    return " ".join(advice(scenario, best))


# -- by a machine file -------------------------------------------------------------------------------------------------


def test_json_says_where_blocks_live_and_what_the_machine_does(
    model: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budgets = ("--memory", on_device(model, 5), "--host-memory", on_host(4))
    report = json_of(capsys, "plan", model, "--machine", file, *WORK, *budgets)
    assert [item["name"] for item in report["strategies"]] == ["resident", "sequential", "overlap"]
    about = report["machine"]
    assert (about["name"], about["device"], about["accelerator"]) == ("made up", "cuda:0", "Made-up 1")
    assert (about["link_bytes_per_s"], about["read_bytes_per_s"], about["page_locked"]) == (2e8, 1e8, True)
    assert (about["budget_bytes"], about["host_budget_bytes"]) == (
        int(on_device(model, 5)[:-1]),
        int(on_host(4)[:-1]),
    )
    assert set(fitting(report)) == {"sequential", "overlap"}
    for item in fitting(report).values():
        places = [item[f"{name}_blocks"] for name in ("resident", "host_stored", "disk", "cpu")]
        assert sum(places) == report["model"]["num_blocks"] == 13
        assert min(places[:3]) > 0
        assert item["streamed_blocks"] == item["host_stored_blocks"] + item["disk_blocks"]
        assert set(item["memory_bytes"]) == {"device", "host", "disk"}
        assert 0 < item["memory_bytes"]["device"] <= about["budget_bytes"]
        assert 0 < item["memory_bytes"]["host"] <= about["host_budget_bytes"]
        assert item["disk_blocks"] * LAYER_BYTES <= item["memory_bytes"]["disk"]
        assert item["memory_bytes"]["disk"] <= item["disk_blocks"] * LAYER_BYTES + 2 * 256 * 512
        assert item["device"] == "cuda:0"
        for name in ("prefill_s", "decode_s_per_pass"):
            assert item["low"][name] < item[name] < item["high"][name]
    assert report["recommended"] == min(fitting(report), key=lambda name: fitting(report)[name]["total_s"])
    refused = report["strategies"][0]
    assert not refused["fits"]
    assert refused["required_bytes"] > about["budget_bytes"]
    assert "cuda:0" in refused["why_not"]


def test_without_budgets_what_was_free_less_a_reserve(
    model: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json_of(capsys, "plan", model, "--machine", file, *WORK)
    assert report["machine"]["budget_bytes"] == 8 * 10**9 - (512 << 20)
    assert report["machine"]["host_budget_bytes"] == (64 << 30) - (64 << 30) // 10
    assert report["recommended"] == "resident"
    assert any("8.00 GB that were free" in note for note in report["notes"])
    generous = json_of(capsys, "plan", model, "--machine", file, *WORK, "--memory", "20GB")
    assert generous["machine"]["budget_bytes"] == 20 * 10**9
    assert any("--memory is more than 10.0 GB, all that Made-up 1 has" in note for note in generous["notes"])


@pytest.mark.parametrize(
    ("options", "name", "rate"),
    [
        ((), "cuda:0", 2e8),
        (("--device", "cuda"), "cuda:0", 2e8),
        (("--device", "cuda:1"), "cuda:1", 5e7),
        (("--device", "cpu"), "cpu", None),
    ],
)
def test_the_device_that_is_named_computes(
    model: Path, file: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], name: str, rate: float
) -> None:
    report = json_of(capsys, "plan", model, "--machine", file, *WORK, *options)
    assert (report["machine"]["device"], report["machine"].get("link_bytes_per_s")) == (name, rate)
    best = fitting(report)[report["recommended"]]
    assert set(best["memory_bytes"]) == {"device", "host", "disk"}
    assert (best["memory_bytes"]["device"] > 0) == (name != "cpu")


def test_a_file_without_accelerators_plans_for_its_cpu(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.toml"
    path.write_text(machine_to_toml(machine().on("cpu", origin="x")))
    report = json_of(capsys, "plan", model, "--machine", path, *WORK)
    assert report["machine"]["device"] == "cpu"
    assert "accelerator" not in report["machine"]
    code, out, err = call(capsys, "plan", model, "--machine", path, "--device", "cuda")
    assert (code, out) == (2, "")
    assert f"--device cuda: {path} describes no such device, only cpu" in err


def test_a_catalogue_model_is_planned_for_the_file_s_device(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, processor in (
        ((), "Made-up 1"),
        (("--device", "cuda:1"), "Made-up 2"),
        (("--device", "cpu"), "made up"),
    ):
        report = json_of(capsys, "plan", "llama-3-8b", "--machine", file, *options)
        assert report["machine"]["processor"] == processor


def test_a_catalogue_machine_takes_host_memory_as_before(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json_of(capsys, "plan", model, "--machine", "rtx-4090", "--host-memory", "1GiB")
    assert report["machine"]["host_memory_bytes"] == 1 << 30
    assert "hybrid" in [item["name"] for item in report["strategies"]]


def test_no_torch_is_needed(model: Path, file: Path) -> None:
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'torch', 'transformers', 'numpy', 'safetensors', 'gguf', 'accelerate'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from headrace.cli.main import main\n"
        f"ask = ['plan', {str(model)!r}, '--machine', {str(file)!r}]\n"
        f"little = ['--memory', {on_device(model, 5)!r}, '--host-memory', '1GiB']\n"
        "for more in ([], little, [*little, '--cpu-blocks', '--cache-on-host', '--json'], ['--device', 'cpu']):\n"
        "    assert main(ask + more) == 0, more\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_table_names_where_blocks_live_and_the_text_what_would_help(
    model: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budgets = ("--memory", on_device(model, 5), "--host-memory", on_host(40))
    report = json_of(capsys, "plan", model, "--machine", file, *WORK, *budgets)
    code, out, err = call(capsys, "plan", model, "--machine", file, *WORK, *budgets)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert "reads 100 MB/s, copies 200 MB/s to cuda:0 (Made-up 1); headrace may hold" in out
    best = fitting(report)["overlap"]
    (row,) = [line for line in lines if line[:2] == ["overlap", "*"]]
    where = (
        f"{best['resident_blocks']} on device, {best['host_stored_blocks']} from host, {best['disk_blocks']} from disk"
    )
    assert where in " ".join(row), "in one line"
    assert row[-1] == "link"
    (resident,) = [item for item in report["strategies"] if item["name"] == "resident"]
    needed = f"{math.ceil(resident['required_bytes'] / 1e6)}MB"
    assert re.search(rf"^resident: needs [0-9.]+ MB on cuda:0: --memory {needed}$", out, re.MULTILINE)
    assert "".join(f"{sentence}\n" for sentence in report["advice"]) in out
    assert report["advice"][0].startswith("The link to cuda:0 binds")
    chart = [line.split("|")[0].strip() for line in out.splitlines() if line.endswith("|")]
    assert chart == ["read", "copy", "compute", "stall"]
    code, out, _ = call(capsys, "plan", model, "--machine", file, *WORK)
    assert code == 0
    assert "resident * all resident" in " ".join(out.split())
    (row,) = [line.split() for line in out.splitlines() if line.split()[:2] == ["resident", "*"]]
    assert row[-1] == "compute"
    assert "note: budget on cuda:0: 8.00 GB that were free when it was measured, less 537 MB in reserve\n" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cuda:7"), "describes no such device, only cpu, cuda:0 (Made-up 1), cuda:1 (Made-up 2)"),
        (("--device", "gpu"), "--device gpu: "),
        (("--device", "cpu", "--host-memory", "1GiB"), "--host-memory is for an accelerator (--device cuda)"),
        (("--device", "cpu", "--cpu-blocks"), "--cpu-blocks is for an accelerator"),
        (("--device", "cpu", "--cache-on-host"), "--cache-on-host is for an accelerator"),
        (("--host-memory", "12 parsecs"), "12 parsecs"),
        (("--prompt-tokens", "9000"), "9000 + 1 tokens do not fit the context of twelve, 8192 tokens"),
        (("--dtype", "float16", "--device", "cpu"), "has no measurement of float16 products"),
    ],
)
def test_a_mistake_is_answered_by_one_message(
    model: Path, file: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    code, out, err = call(capsys, "plan", model, "--machine", file, *options)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("headrace: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cuda"), "--device cuda applies to the machine at hand or to one that `headrace probe` measured"),
        (("--cpu-blocks",), "--cpu-blocks applies to the machine at hand"),
        (("--cache-on-host",), "compared anyhow"),
    ],
)
def test_what_a_catalogue_machine_does_not_heed_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    for asked in (str(model), "llama-3-8b"):
        code, out, err = call(capsys, "plan", asked, "--machine", "8xh100", *options)
        assert (code, out) == (2, "")
        assert message in err


def test_what_runs_taught_of_the_disk_counts_here_too_and_a_gpu_s_runs_are_its_own(
    model: Path, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = RunRecord(
        at="2025-01-01T00:00:00+00:00", machine="made up", model="x", active_parameters=1e6, stored_dtype="BF16",
        compute_dtype="bfloat16", strategy="overlap", budget_bytes=1, sequences=1, prompt_tokens=1, generated_tokens=1,
        read_limited=False, binds="disk", predicted_prefill_s=1.0, measured_prefill_s=1.0, predicted_decode_s=1.0,
        measured_decode_s=1.0, measured_read_bytes_per_s=7e7, streamed_blocks=1,
    )  # fmt: skip
    history = tmp_path / "history.jsonl"
    monkeypatch.setenv(history_file.VARIABLE, str(history))
    for name, rate in (("made up cuda:0", 1e8), ("made up", 7e7)):
        history.write_text(3 * dataclasses.replace(record, machine=name).to_line())
        assert json_of(capsys, "plan", model, "--machine", file, *WORK)["machine"]["read_bytes_per_s"] == rate


# -- the rates that a file gives ---------------------------------------------------------------------------------------


def test_every_constant_comes_from_the_file(model: Path) -> None:
    made = with_host_memory(machine(read_latency_s=1e-3), 3e8)
    scenario = scenario_of(model, made)
    rates = scenario.known_rates
    assert (rates.link_bytes_per_s, rates.staged_bytes_per_s, rates.memory_copy_bytes_per_s) == (2e8, 1.5e8, 1.5e8)
    assert (rates.read_bytes_per_s, rates.read_latency_s, rates.pass_overhead_s) == (1e8, 1e-3, 1e-5)
    assert rates.block_overhead_s == 4e-5
    assert rates.curve == FIRST.arithmetic.curves[0]
    assert rates.activation_latency_s == 2e-6
    assert rates.activation_s_per_token == 2 * 256 * 2 / 1e8
    assert rates.cpu_layer is not None
    assert rates.cpu_layer.decode_s == pytest.approx(LAYER_PARAMETERS * 4e-9, rel=0.01)
    assert rates.cpu_layer.prefill_s == pytest.approx(LAYER_PARAMETERS * 1.55e-8, rel=0.01)
    fast = scenario_of(model, with_host_memory(machine(), 1e12)).known_rates
    assert fast.staged_bytes_per_s == fast.link_bytes_per_s
    limited = accelerator_rates(made, scenario.model, compute_dtype="bfloat16", read_limit_bytes_per_s=5e6)
    assert limited.read_bytes_per_s == 5e6


def test_weights_in_another_dtype_are_widened_at_the_device_s_memory_rate(model: Path) -> None:
    curve = scenario_of(model, dtype="float32").known_rates.known_curve
    assert (curve.compute_dtype, curve.stored_dtype) == ("float32", "BF16")
    for point, plain in zip(curve.points, FIRST.arithmetic.curves[2].points, strict=True):
        assert point.seconds_per_parameter == pytest.approx(plain.seconds_per_parameter + (2 + 4) / 1e12)
    without = dataclasses.replace(FIRST, arithmetic=arithmetic(FIRST.arithmetic.curves[:1]))
    with pytest.raises(MachineError, match="Made-up 1 has no measurement of float32 products with BF16 weights"):
        answer_of(model, machine(without), dtype="float32")


def test_a_system_that_locks_nothing_is_planned_through_a_ring(model: Path) -> None:
    assert FIRST.copies is not None
    unlocked = dataclasses.replace(FIRST, copies=dataclasses.replace(FIRST.copies, page_locked=False))
    answer = answer_of(model, machine(unlocked))
    assert not answer.scenario.pinned
    assert any("no host memory was page-locked" in note for note in answer.notes)
    assert scenario_of(model).pinned


def test_a_cpu_that_was_not_measured_can_be_asked_for_nothing(model: Path) -> None:
    unmeasured = with_unmeasured_cpu(machine())
    assert scenario_of(model, unmeasured).known_rates.cpu_layer is None
    with pytest.raises(MachineError, match="has no measurement of bfloat16 products"):
        answer_of(model, unmeasured, cpu_blocks=True)
    with pytest.raises(MachineError):
        cpu_layer_times(
            unmeasured,
            scenario_of(model).model,
            Workload(prompt_tokens=16, generate_tokens=32),
            compute_dtype="bfloat16",
        )


def test_which_accelerator_a_name_means() -> None:
    other = dataclasses.replace(FIRST, device="fake:0")
    both = machine(other, FIRST)
    assert both.on("auto", origin="x").processor is other
    for name in ("cuda", "cuda:0"):
        chosen = both.on(name, origin="x")
        assert (chosen.processor, chosen.others, chosen.notes) == (FIRST, (), ())
    cpu = both.on("cpu", origin="x")
    assert (cpu.processor.kind, cpu.processor.arithmetic.curves, cpu.host, dict(cpu.links)) == ("cpu", CURVES, None, {})
    assert cpu.on("auto", origin="x") == cpu
    with pytest.raises(InvalidRequestError, match=r"--device cuda: x describes .* only cpu, fake:0 \(Made-up 1\)"):
        machine(other).on("cuda", origin="x")


# -- what would help ---------------------------------------------------------------------------------------------------


def with_budget(scenario: Scenario, budget_bytes: int) -> Candidate:
    return plan_fastest(dataclasses.replace(scenario, budget_bytes=budget_bytes))


def said(scenario: Scenario, best: Candidate, sentence: str, seconds: float) -> None:
    """The advice holds the sentence, with this many seconds in it."""
    assert sentence.format(format_seconds(seconds)) in advice_on(scenario, best)


def test_where_the_link_binds_a_faster_one_memory_and_the_cpu_are_weighed(model: Path) -> None:
    scenario = scenario_of(model)
    best = best_of(scenario)
    now_s = best.prediction.decode_s_per_pass
    assert best.prediction.binds == "link"
    faster = scenario.at(dataclasses.replace(scenario.known_rates, link_bytes_per_s=4e8))
    doubled_s = predict(best.plan, faster).decode_s_per_pass
    assert doubled_s < 0.8 * now_s
    doubled_s = min(doubled_s, best_of(faster).prediction.decode_s_per_pass)
    said(scenario, best, "The link to cuda:0 binds: one of twice the speed would make a pass {}", doubled_s)
    found = advice_on(scenario, best)
    assert "host memory" not in found, "there is enough for what comes from the disk"
    assert "More tokens in a pass are free up to" in found
    needed = parse_size(found.split(" (--memory ")[1].split(")")[0])
    assert set(with_budget(scenario, needed).plan.placements) == {Placement.DEVICE}
    assert with_budget(scenario, needed - 10**6).plan.strategy.value != "resident", "rounded up to whole MB"
    helped = plan_fastest(dataclasses.replace(scenario, allow_cpu=True))
    assert helped.plan.cpu_blocks > 0
    assert f"the CPU would compute {helped.plan.cpu_blocks} layers where they lie" in found
    said(
        scenario,
        best,
        "{} per pass, as predicted; results may then differ in rounding",
        helped.prediction.decode_s_per_pass,
    )


def test_a_cpu_too_slow_to_help_is_told_and_one_not_measured_is_not_spoken_of(model: Path) -> None:
    curve = CURVES[0].scaled(1000.0)
    slow = scenario_of(model, machine(curves=(curve,)))
    assert "too slow for layers of this model (--cpu-blocks)" in advice_on(slow, best_of(slow))
    allowed = scenario_of(model, machine(curves=(curve,)), cpu_blocks=True)
    assert best_of(allowed).prediction.binds == "link"
    assert "--cpu-blocks" not in advice_on(allowed, best_of(allowed)), "it may help already"
    small = scenario_of(model, host_memory=on_host(12))
    assert "For --cpu-blocks the host's budget is too small" in advice_on(small, best_of(small))
    unknown = scenario_of(model, with_unmeasured_cpu(machine()))
    assert "--cpu-blocks" not in advice_on(unknown, best_of(unknown))


def test_where_the_disk_binds_host_memory_is_the_remedy(model: Path) -> None:
    scenario = scenario_of(model, host_memory=on_host(3))
    best = best_of(scenario)
    assert best.prediction.binds == "disk"
    faster = scenario_of(model, machine(read_bytes_per_s=2e8), host_memory=on_host(3))
    doubled_s = best_of(faster).prediction.decode_s_per_pass
    assert doubled_s < 0.8 * best.prediction.decode_s_per_pass
    said(scenario, best, "The disk binds: one of twice the speed would make a pass {}", doubled_s)
    found = advice_on(scenario, best)
    needed = parse_size(found.split("(--host-memory ")[1].split(")")[0])
    roomy = plan_fastest(dataclasses.replace(scenario, host_budget_bytes=needed))
    assert roomy.prediction.binds == "link"
    said(
        scenario,
        best,
        "more host memory would hold what comes from the disk: {} per pass",
        roomy.prediction.decode_s_per_pass,
    )
    assert "--cpu-blocks" not in found


def test_what_else_may_bind_is_named(model: Path) -> None:
    fast = with_copies(FIRST, while_computing_bytes_per_s=1e12)
    hidden = scenario_of(model, machine(fast))
    overlap = plan_strategy(hidden, Strategy.OVERLAP)
    assert overlap.plan.streamed_blocks > 0
    assert advice_on(hidden, overlap).startswith("The accelerator binds: what is loaded hides behind its arithmetic")
    roomy = scenario_of(model, memory="1GiB")
    assert advice_on(roomy, best_of(roomy)).startswith("The accelerator binds, and every weight is in memory")
    computing = scenario_of(model, cpu_blocks=True)
    best = best_of(computing)
    assert best.prediction.binds == "cpu"
    found = advice_on(computing, best)
    assert f"The CPU binds, with the {best.plan.cpu_blocks} layers that it computes" in found
    assert "With --cpu-blocks" not in found
    turns = scenario_of(model, host_memory=on_host(3))
    sequential = plan_strategy(turns, Strategy.SEQUENTIAL)
    assert "Loading and computing take turns: a link of twice the speed" in advice_on(turns, sequential)
    assert ", a disk of twice the speed " in advice_on(turns, sequential)


def test_a_step_of_memory_is_never_smaller_than_the_blocks_it_should_hold(model: Path) -> None:
    found = best_of(scenario_of(model))
    asked: list[int] = []

    def taking(seconds: float) -> Candidate:
        return Candidate(found.plan, dataclasses.replace(found.prediction, decode_s_per_pass=seconds))

    def under(budget_bytes: int) -> Candidate:
        asked.append(budget_bytes)
        return taking(10.0 - budget_bytes / 2**30)

    def told(now_s: float, enough_bytes: int | None) -> str:
        return more_memory(
            taking(now_s),
            under,
            name="device memory",
            option="--memory",
            budget_bytes=0,
            block_bytes=3 << 30,
            enough_bytes=enough_bytes,
            holds="everything",
        )

    assert told(10.0, None) == "Each further GiB of device memory saves about 1 s per pass."
    assert asked == [6 << 30]
    assert told(10.0, 0) == ""
    everything = "1.07 GB more device memory would hold everything: 9 s per pass (--memory 1074MB)."
    assert told(10.0, 1 << 30) == everything
    assert "nothing worth having" in told(4.0, None)


def test_everything_in_memory_means_the_device_s_own(model: Path) -> None:
    needed = budget_for_everything(scenario_of(model))
    assert needed == beside_bytes(model) + 12 * LAYER_BYTES
    assert budget_for_everything(scenario_of(model, cpu_blocks=True, cache_on_host=True)) == needed


def test_break_even_counts_what_both_memories_hold(model: Path) -> None:
    scenario = scenario_of(model)
    best = best_of(scenario)
    even = break_even_of(scenario, best)
    tokens = even.tokens_per_pass.expected
    assert tokens > 1
    assert even.kv_cache_bytes == pytest.approx(tokens * 16 * 2 * 12 * 2 * 64 * 2, rel=0.02)
    many, two = (
        dataclasses.replace(scenario, workload=dataclasses.replace(WORKLOAD, sequences=sequences))
        for sequences in (10**6, 2)
    )
    assert minimum_bytes(two) <= scenario.budget_bytes < minimum_bytes(many)
    starved = dataclasses.replace(scenario, host_budget_bytes=1 << 20)
    assert break_even_of(starved, best).tokens_per_pass == even.tokens_per_pass
    (batch,) = [way for way in break_even_of(starved, best).ways if way.name == "batch"]
    assert not batch.reached, "the host has no room for the ring"
    assert budget_for_everything(starved) is None


def test_a_picture_shows_the_device_s_memory(
    model: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.svg"
    code, _, err = call(
        capsys, "plan", model, "--machine", file, *WORK, "--memory", on_device(model, 5), "--plot", path
    )
    assert code == 0, err
    text = path.read_text()
    for label in ("memory of cuda:0", "cuda:0 of made up", "tokens per pass", "break-even", "overlapped"):
        assert label in text


# -- measured here -----------------------------------------------------------------------------------------------------


def test_plan_predicts_what_a_run_then_decides(
    model: Path, device: FakeAccelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--memory", on_device(model, 5), "--host-memory", on_host(4))
    report = json_of(capsys, "plan", model, "--device", "cuda", *WORK, *options)
    about = report["machine"]
    assert (about["device"], about["accelerator"], about["link_bytes_per_s"]) == ("fake:0", "fake:0", 2e8)
    best = fitting(report)[report["recommended"]]
    with api.load(
        model, device=device, memory=on_device(model, 5), host_memory=on_host(4), prompt_tokens=8, max_tokens=16
    ) as loaded:
        plan, predicted = loaded.headrace.plan, loaded.headrace.prediction
    assert plan.strategy.value == report["recommended"]
    assert [best[f"{name}_blocks"] for name in ("resident", "host_stored", "disk")] == [
        plan.placements.count(place) for place in (Placement.DEVICE, Placement.HOST, Placement.DISK)
    ]
    assert best["decode_s_per_pass"] == predicted.decode_s_per_pass
    assert best["memory_bytes"]["device"] == plan.memory.total_bytes
    assert device.held_bytes() == 0


def test_without_a_name_the_device_is_what_a_run_takes(
    model: Path, device: FakeAccelerator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_budget, "free_bytes", lambda: 8 << 30)
    report = json_of(capsys, "plan", model, *WORK)
    assert report["machine"]["device"] == "fake:0"
    assert report["machine"]["budget_bytes"] == (1 << 30) - (512 << 20)
    assert report["machine"]["host_budget_bytes"] == 7 << 30
    on_processor = json_of(capsys, "plan", model, *WORK, "--device", "cpu", "--memory", "1GiB")
    assert on_processor["machine"]["device"] == "cpu"
    monkeypatch.undo()
    by_default = json_of(capsys, "plan", model, *WORK, "--memory", "1GiB")
    assert by_default["machine"]["device"] == "cpu", "HEADRACE_DEVICE is cpu in tests"


def test_an_accelerator_takes_the_head_whole_and_the_cpu_in_pieces(
    file: Path, device: FakeAccelerator, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = tmp_path / "wide"
    write_checkpoint(model, SHAPE._replace(layers=2, vocabulary=16384), shard_bytes=1_000_000_000, seed=0)
    for options in (("--machine", file), ("--memory", "500MB", "--host-memory", "100MB")):
        assert json_of(capsys, "plan", model, *WORK, *options)["model"]["num_blocks"] == 3
    found = headrace.plan(model, device="cuda", memory="500MB", host_memory="100MB", prompt_tokens=8, generate_tokens=8)
    assert fitting(found)["resident"]["num_blocks"] == 3
    assert json_of(capsys, "plan", model, *WORK, "--machine", file, "--device", "cpu")["model"]["num_blocks"] > 3


def test_layers_and_caches_on_the_host_are_planned_where_they_may_be(
    model: Path, device: FakeAccelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--device", "cuda", *WORK, "--memory", on_device(model, 5), "--host-memory", on_host(40))
    plain = json_of(capsys, "plan", model, *options)
    assert fitting(plain)["overlap"]["cpu_blocks"] == 0
    assert any("With --cpu-blocks the CPU would compute" in each for each in plain["advice"]), (
        "its layer was timed for that"
    )
    assert not any("rounding" in note for note in plain["notes"])
    helped = json_of(capsys, "plan", model, *options, "--cpu-blocks")
    best = fitting(helped)[helped["recommended"]]
    assert best["cpu_blocks"] > 0
    assert best["decode_s_per_pass"] < fitting(plain)[plain["recommended"]]["decode_s_per_pass"]
    assert any("rounding" in note for note in helped["notes"])
    many = ("--batch", "256", "--device", "cuda", *WORK, "--host-memory", "1GiB")
    needed = json_of(capsys, "plan", model, *many, "--memory", "900MB")["strategies"]
    least = min(item["memory_bytes"]["device"] for item in needed if item["fits"])
    memory = ("--memory", f"{least - 25_000_000}B")
    assert call(capsys, "plan", model, *many, *memory)[0] == 2
    kept = json_of(capsys, "plan", model, *many, *memory, "--cache-on-host")
    assert all(item["cache_on_host"] for item in fitting(kept).values())


def test_the_cpu_is_only_timed_where_it_may_help(
    model: Path, device: FakeAccelerator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    on: list[str] = []

    def time_layer(*_args: object, device: Device, **_options: object) -> TimedLayer:
        on.append(device.name)
        return TIMED_LAYER

    monkeypatch.setattr(calibration, "time_layer", time_layer)
    options = ("--device", "cuda", *WORK, "--host-memory", on_host(40))
    for memory, more, names in (
        ("500MB", (), ["fake:0"]),
        (on_device(model, 5), (), ["fake:0", "cpu"]),
        (on_device(model, 5), ("--cpu-blocks",), ["fake:0", "cpu"]),
    ):
        on.clear()
        json_of(capsys, "plan", model, *options, "--memory", memory, *more)
        assert on == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "cuda", "--memory", "2GiB"), "only 1.07 GB of its 1.07 GB are free"),
        (("--device", "cuda", "--memory", "10MB"), "Raise --memory to"),
        (("--device", "cpu", "--host-memory", "1GiB"), "--host-memory is for an accelerator (--device cuda)"),
        (("--device", "cpu", "--cpu-blocks"), "--cpu-blocks is for an accelerator"),
    ],
)
def test_what_a_run_would_refuse_a_plan_refuses(
    model: Path,
    device: FakeAccelerator,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    code, out, err = call(capsys, "plan", model, *options)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert device.held_bytes() == 0


@pytest.mark.parametrize(
    ("name", "message"), [("cuda", "--device cuda"), ("cuda:5", "--device cuda"), ("tpu", "unknown device")]
)
def test_a_device_that_is_not_there_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = call(capsys, "plan", model, "--device", name)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


# -- from Python -------------------------------------------------------------------------------------------------------


def test_plans_from_python(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: FakeAccelerator
) -> None:
    work: dict[str, Any] = {"prompt_tokens": 8, "generate_tokens": 8, "memory": on_device(model, 5)}
    found = headrace.plan(model, device="cuda", host_memory=on_host(4), **work)
    budgets = ("--memory", on_device(model, 5), "--host-memory", on_host(4))
    assert found == json_of(capsys, "plan", model, "--device", "cuda", *WORK, *budgets)
    assert set(fitting(found)) == {"sequential", "overlap"}
    overlap = fitting(found)["overlap"]
    assert overlap["device"] == "fake:0"
    assert min(overlap[f"{name}_blocks"] for name in ("resident", "host_stored", "disk")) > 0
    helped = headrace.plan(model, device="cuda", host_memory=on_host(40), cpu_blocks=True, strategy="overlap", **work)
    assert [item["name"] for item in helped["strategies"]] == ["overlap"]
    assert fitting(helped)["overlap"]["cpu_blocks"] > 0
    with pytest.raises(InvalidRequestError, match="--host-memory is for an accelerator"):
        headrace.plan(model, device="cpu", host_memory="1GiB", **work)
    assert fitting(headrace.plan(model, device="cpu", **work))["sequential"]["device"] == "cpu"
    open_as(monkeypatch, FakeAccelerator(memory_bytes=1 << 20))
    with pytest.raises(BudgetError, match="are free"):
        headrace.plan(model, device="cuda", host_memory="1GiB", **work)


def test_the_device_to_probe_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, str | Device]] = []

    def probed(directory: Path, *, device: str | Device) -> Machine:
        asked.append((directory, device))
        return machine()

    monkeypatch.setattr(machine_probe, "probe_machine", probed)
    headrace.probe()
    headrace.probe(tmp_path, device="cuda:1")
    assert asked == [(Path(), "auto"), (tmp_path, "cuda:1")]
