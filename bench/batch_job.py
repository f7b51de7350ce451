"""A job of real requests: predicted beside measured, and every answer held against a run of its own.

python bench/batch_job.py --model DIR [--requests 1000] [--compared 150] [--share 0.5] [--read-limit 700MB/s]

The answers that are compared are generated one by one by transformers' resident model, greedily, in float32. Where a
text differs, the reference's two largest logits at the first token that differs are looked at: a tie within rounding
is broken either way.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench_report
from job_requests import make_requests


def main() -> None:
    """Measure, compare, and write bench/results/batch-job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--compared", type=int, default=150)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--read-limit", default="1GB/s")
    parser.add_argument("--pilot", type=int, default=60, help="requests of a first job that tells how long answers are")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    weights = sum(path.stat().st_size for path in options.model.glob("*.safetensors"))
    lines = make_requests(options.requests)
    step = max(1, options.requests // options.pilot)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pilot = run(options, lines[:: step + (step % 4 == 0)], folder, "pilot", weights, 1.0)
        share = pilot["measured"]["generated_tokens"] / pilot["predicted"]["generated_tokens"]
        report = run(options, lines, folder, "job", weights, share)
        answers = [json.loads(line) for line in (folder / "job-out.jsonl").read_text().splitlines()]
    texts = {line["custom_id"]: line["response"]["body"]["choices"][0] for line in answers}
    if len(texts) != options.requests or len(answers) != options.requests:
        raise SystemExit(f"{len(answers)} answers to {options.requests} requests")
    compared = compare(options.model, lines[:: max(1, options.requests // max(1, options.compared))], texts)
    predicted, measured = report["predicted"], report["measured"]
    rows = [
        ["time of the job, s", f"{predicted['total_s']:.1f}", f"{measured['total_s']:.1f}"],
        ["passes", str(predicted["passes"]), str(measured["passes"])],
        ["tokens per pass", f"{predicted['tokens_per_pass']:.1f}", f"{measured['tokens_per_pass']:.1f}"],
        ["answer tokens", str(predicted["generated_tokens"]), str(measured["generated_tokens"])],
        [
            "answer tokens per second",
            f"{predicted['generated_tokens_per_s']:.1f}",
            f"{measured['generated_tokens_per_s']:.1f}",
        ],
    ]
    held = measured["peak_memory_bytes"] - measured["process_overhead_bytes"]
    text = (
        f"# {options.requests} requests, {options.model.name}, float32, {options.share:.0%} of the weights' bytes, "
        f"{options.read_limit}\n\n{bench_report.table(('', 'predicted', 'measured'), rows)}\n\n"
        f"Packing: {report['packing']}; {report['plan']['resident_blocks']} of {report['plan']['num_blocks']} blocks "
        f"kept. Prediction off by {predicted['total_s'] / measured['total_s'] - 1:+.1%} (answers use {share:.0%} of "
        f"their longest length, as a pilot of {pilot['requests']} requests told). Memory held: {held / 1e6:.0f} MB of "
        f"{int(weights * options.share) / 1e6:.0f} MB. Prompt tokens: {measured['prompt_tokens']}, of which "
        f"{measured['shared_prompt_tokens']} copied.\n\n"
        f"Compared one by one: {compared['compared']} answers, {compared['different']} of them different; gap of the "
        f"reference's two largest logits where they part: {[f'{gap:.1e}' for gap in compared['gaps']]}."
    )
    bench_report.write("batch-job", {"report": report, "pilot": pilot, "compared": compared}, text, out=options.out)


def run(
    options: argparse.Namespace, lines: list[dict[str, Any]], folder: Path, name: str, weights: int, share: float
) -> dict[str, Any]:
    """One job; its JSON report."""
    source = folder / f"{name}-in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "headrace", "batch", str(options.model), str(source)]
    command += [str(folder / f"{name}-out.jsonl"), "--json", "--dtype", "float32", "--read-limit", options.read_limit]
    command += ["--memory", str(int(weights * options.share)), "--answer-share", str(min(1.0, share))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HEADRACE_HISTORY": ""})
    if done.returncode:
        raise SystemExit(done.returncode)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(model: Path, lines: list[dict[str, Any]], texts: dict[str, Any]) -> dict[str, Any]:
    """Generate each answer alone and compare."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    different, gaps = [], []
    for line in lines:
        if "messages" in line:
            whole = tokenizer.apply_chat_template(line["messages"], tokenize=False, add_generation_prompt=True)
            ids = tokenizer(whole, add_special_tokens=False, return_tensors="pt")["input_ids"]
        else:
            ids = tokenizer(line["prompt"], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            made = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=line["max_tokens"],
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = made.sequences[0, ids.shape[1] :].tolist()
        expected = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        choice = texts[line["custom_id"]]
        found = choice["text"] if "text" in choice else choice["message"]["content"]
        if found != expected:
            different.append(line["custom_id"])
            for place in range(len(tokens)):
                beginning = tokenizer.decode(tokens[: place + 1], skip_special_tokens=True)
                if not found.startswith(beginning):
                    top = made.logits[place][0].topk(2).values
                    gaps.append(float(top[0] - top[1]))
                    break
    return {"compared": len(lines), "different": len(different), "ids": different, "gaps": gaps}


if __name__ == "__main__":
    main()
