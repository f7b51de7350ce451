"""Make the 3 GB checkpoint if it is not there and run the benchmarks that need no rivals.

python bench/run_all.py [--quick] [--model DIR]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent


def main() -> None:
    """Run one benchmark after the other; stops at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds; results go to a scratch folder")
    parser.add_argument("--model", type=Path, default=Path.home() / ".cache" / "headrace" / "models" / "llama-3gb")
    options = parser.parse_args()
    if not (options.model / "config.json").exists():
        run("make_checkpoint.py", str(options.model), "--shape", "llama-3gb")
    model = ["--model", str(options.model)]
    out = ["--out", str(options.model.parent / "quick-results")] if options.quick else []
    few = ["--rounds", "1"] if options.quick else []
    run("overlap.py", *model, "--dtype", "float32", *few, *out)
    run("overlap.py", *model, "--dtype", "bfloat16", *few, *out)
    if shutil.which("fio"):
        run("link.py", *model, *few, *out)
    else:
        print("link.py: skipped, fio is not installed")
    fewer = ["--quick"] if options.quick else []
    run("prediction.py", "--models", str(options.model), *fewer, *out)
    if not options.quick:
        run("prediction.py", "--models", str(options.model), "--raw", *out)


def run(script: str, *arguments: str) -> None:
    """Run one script of this folder with this interpreter."""
    subprocess.run([sys.executable, str(BENCH / script), *arguments], check=True)


if __name__ == "__main__":
    main()
