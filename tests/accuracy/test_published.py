"""Predictions against published measurements: the reader, the goals, and a ratchet that only lets errors fall.

`data/published_measurements.csv` holds 658 figures with their sources.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import pytest

from headrace.accuracy.cross_validated import CrossValidated, cross_validated
from headrace.accuracy.published import read_rows
from headrace.accuracy.published_case import Excluded, case_of
from headrace.accuracy.published_metrics import FamilyAccuracy, PredictedRow, accuracy_by_family, predict_row
from headrace.cli.accuracy_command import report_json
from headrace.errors import InvalidRequestError
from headrace.machine.engine import engine_named, engines

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "data" / "published_measurements.csv"
RATCHET = {
    # family: rows that count at least, median error, 90th percentile, share inside the interval: today's, with a hair
    "stream": (34, 0.1060, 0.2495, 0.93),
    "resident": (124, 0.0912, 0.3955, 0.92),
    "tensor": (192, 0.0644, 0.2468, 0.97),
    "pipeline": (49, 0.0582, 0.2200, 0.97),
    "cpu": (9, 0.5120, 1.2315, 0.99),
    "moe": (5, 0.5455, 0.8005, 0.99),
    "other": (185, 0.3120, 0.8035, 0.99),
}
GOALS = {"stream": (0.12, 0.35), "resident": (0.15, 9.0), "tensor": (0.15, 9.0), "pipeline": (0.15, 9.0)}


@functools.cache
def rows() -> tuple[PredictedRow, ...]:
    return tuple(predict_row(row) for row in read_rows(FILE))


@functools.cache
def families() -> dict[str, FamilyAccuracy]:
    return {item.family: item for item in accuracy_by_family(list(rows()))}


def left_out() -> CrossValidated:
    judged = cross_validated(FILE)
    assert judged is not None, "the rows changed: python bench/fit_engines.py"
    return judged


@pytest.mark.parametrize("family", list(RATCHET))
def test_errors_only_fall(family: str) -> None:
    least, median, p90, inside = RATCHET[family]
    found = families()[family]
    assert found.n >= least, "rows are not got rid of"
    assert found.median_abs_error is not None
    assert found.p90_abs_error is not None
    assert found.inside_interval is not None
    assert found.median_abs_error <= median
    assert found.p90_abs_error <= p90
    assert found.inside_interval >= inside


@pytest.mark.parametrize("family", list(GOALS))
def test_the_goals_are_kept(family: str) -> None:
    median, p90 = GOALS[family]
    found = families()[family]
    assert (found.median_abs_error or 1) <= median
    assert (found.p90_abs_error or 99) <= p90


def test_four_of_five_rows_lie_inside_their_interval() -> None:
    inside = [item.inside for item in rows() if item.inside is not None]
    assert len(inside) >= 630
    assert sum(inside) / len(inside) >= 0.95


def test_no_interval_is_without_meaning() -> None:
    """An interval from zero to infinity holds everything; these are a factor of 3 wide or less in the middle."""
    widths = sorted(
        item.predicted.high / item.predicted.low for item in rows() if item.predicted is not None and item.error
    )
    assert widths[len(widths) // 2] < 3


@pytest.mark.parametrize("family", ["stream", "resident", "tensor", "pipeline"])
def test_errors_on_sources_left_out_only_fall(family: str) -> None:
    """Today's with a hair; those of engines that another source knows and that none knows lie in `groups`."""
    median, p90 = {
        "stream": (0.17, 0.58),
        "resident": (0.175, 0.45),
        "tensor": (0.175, 0.71),
        "pipeline": (0.13, 0.61),
    }[family]
    found = left_out().families[family]
    assert found.n == families()[family].n
    assert (found.median_abs_error or 1) <= median
    assert (found.p90_abs_error or 9) <= p90


def test_intervals_hold_rows_of_sources_left_out_and_still_say_something() -> None:
    for found in left_out().groups.values():
        assert (found.inside_interval or 0) > 0.84, found.family
        assert (found.interval_width or 99) < 5, found.family
    inside = sum(found.n * (found.inside_interval or 0) for found in left_out().groups.values())
    assert inside / sum(found.n for found in left_out().groups.values()) > 0.89


def test_rows_other_than_the_shipped_ones_have_no_error_with_sources_left_out(tmp_path: Path) -> None:
    other = tmp_path / "rows.csv"
    other.write_bytes(FILE.read_bytes() + b"\n")
    assert cross_validated(other) is None


def test_the_results_are_those_of_the_code() -> None:
    """`python bench/published.py` makes them anew."""
    stored = json.loads((ROOT / "bench/results/published.json").read_text())
    made = report_json(list(rows()), list(families().values()), left_out())
    assert stored["inside_interval"] == pytest.approx(made["inside_interval"], abs=1e-3)
    for then, now in zip(stored["families"], made["families"], strict=True):
        assert then.pop("cross_validated") == now.pop("cross_validated")
        assert then == pytest.approx(now, abs=1e-3)


@pytest.mark.parametrize("file", ["README.md", "docs/formulas.md"])
def test_prose_states_the_errors_of_the_results(file: str) -> None:
    """Both have the table by family: fitted and with sources left out, median and 90th percentile, in per cent."""
    stored = {
        item["family"]: item for item in json.loads((ROOT / "bench/results/published.json").read_text())["families"]
    }
    text = (ROOT / file).read_text()
    for family, name in {
        "stream": "streaming",
        "resident": "resident",
        "tensor": "tensor",
        "pipeline": "pipeline",
    }.items():
        told = re.search(rf"^\| {name} \|( \d.+)\|$", text, re.MULTILINE)
        assert told is not None, f"{file} has no row of the family {name}"
        item = stored[family]
        expected = [
            str(item["n"]),
            *(
                f"{errors[kind]:.1%}".replace("%", " %")
                for errors in (item, item["cross_validated"])
                for kind in ("median_abs_error", "p90_abs_error", "inside_interval")
            ),
        ]
        assert [cell.strip() for cell in told[1].split("|")] == expected, f"{file}: python bench/published.py"


def test_what_is_excluded_has_a_reason() -> None:
    for item in rows():
        assert (item.error is None) == (item.excluded is not None)
        if item.excluded is not None:
            assert len(item.excluded) > 10


def test_no_decode_row_implies_more_bytes_than_the_memories_deliver() -> None:
    """Weights read per second, as measured, against bandwidth x devices: whatever is above was transcribed wrongly."""
    checked = 0
    for row in read_rows(FILE):
        if row.metric not in {"decode_throughput", "decode_latency_per_token", "tpot_serving"} or row.batch is None:
            continue
        try:
            case = case_of(row)
        except Excluded:
            continue
        if case.family not in {"resident", "tensor", "pipeline"} or case.row.weight_tier != "gpu":
            continue
        seconds = row.batch / row.value if row.unit == "tok/s" else row.value * {"ms": 1e-3, "s": 1.0}[row.unit]
        width = case.arrangement.parallelism.tensor  # stages take turns: only width adds bandwidths
        scenario = case.scenario
        offered = scenario.described_machine.processor.memory_bytes_per_s.high * width
        assert scenario.model.bytes_read(1) / seconds <= offered * 1.05, (row.id, row.model, row.hardware)
        checked += 1
    assert checked > 240


def test_the_json_is_the_contract_s() -> None:
    made = report_json(list(rows()), list(families().values()), left_out())
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert {item["family"] for item in made["families"]} == set(RATCHET)
    for item in made["families"]:
        contract = {"family", "n", "excluded", "median_abs_error", "p90_abs_error", "inside_interval"}
        assert set(item) == contract | {"cross_validated"}
        assert item["cross_validated"]["median_abs_error"] > 0
    assert len(made["rows"]) == 658
    assert set(made["rows"][0]) >= {"id", "predicted", "low", "high", "measured", "excluded"}


def test_engines_are_known_by_many_names() -> None:
    assert engine_named("vllm 0.19.0").name == "vllm"
    assert engine_named("TensorRT-LLM trtllm-bench").name == "tensorrt-llm"
    assert engine_named("trtllm 1.2.0rc6").name == "trtllm"
    assert engine_named("DeepSpeed ZeRO-Inference").name == "zero-inference"
    assert engine_named("a new engine").name == "present"
    for engine in engines().values():
        assert 0 < engine.memory_share.expected <= 1
        assert 0 < engine.compute_share.expected <= 1
        assert engine.spread.low < 1 < engine.spread.high


HEADER = "id,model,hardware,n_devices,strategy,metric,value,unit\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 'id' is missing"),
        ("id,model\n", "column 'hardware' is missing"),
        (HEADER.replace("hardware", "hardwear"), "did you mean hardwear"),
        (HEADER + "a,b,c,1,resident,throughput,fast,tok/s\n", "line 2: value is 'fast'"),
        (HEADER + "a,b,c,1,resident,throughput,-3,tok/s\n", "line 2: value is '-3'"),
        (HEADER + "a,b,c,1,resident,throughput,nan,tok/s\n", "line 2: value is 'nan'"),
        (HEADER + "a,b,c,1,resident,throughput,,tok/s\n", "line 2: value is empty"),
        (HEADER + ",b,c,1,resident,throughput,1,tok/s\n", "line 2: id is empty"),
        (HEADER + "a,b,c\n", "line 2 has another number of fields"),
        (HEADER + "a,b,c,1,resident,throughput,1,tok/s,more\n", "line 2 has another number of fields"),
        (HEADER + "a,b,c,1,resident,throughput,1,tok/s\n" * 2, "the id 'a' stands in rows 1 and 2"),
        (HEADER + '"a,b\n', "comma-separated"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match=message):
        read_rows(path)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_rows(tmp_path / "none.csv")
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xff\x00\xfe")
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_rows(path)


@pytest.mark.parametrize(
    "row",
    [
        "x1,GPT-9,H100,1,resident,decode_throughput,10,tok/s",
        "x1,Llama-3-8B,XYZ9000,1,resident,decode_throughput,10,tok/s",
        "x1,Llama-3-8B,H100,1,teleport,decode_throughput,10,tok/s",
        "x1,Llama-3-8B,H100,1,resident,smell,10,tok/s",
        "x1,Llama-3-8B,H100,1,resident,decode_throughput,10,furlongs",
        "x1,Llama-3-8B,,,resident,decode_throughput,10,tok/s",
    ],
)
def test_a_row_that_is_not_understood_is_excluded_with_a_reason(tmp_path: Path, row: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(HEADER + row + "\n")
    found = predict_row(read_rows(path)[0])
    assert found.predicted is None
    assert found.excluded


def test_a_row_with_the_fewest_fields_is_predicted(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(HEADER.strip() + ",batch_concurrent\nx1,Llama-3-8B,H100,1,resident,decode_throughput,100,tok/s,1\n")
    found = predict_row(read_rows(path)[0])
    assert found.predicted is not None
    assert found.predicted.low <= 100 <= found.predicted.high * 3
