"""Record anew what commands answer, all or those named: `python tests/safety_net/record.py [CASE ...]`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safety_net.answers import RECORDED, record, write_checkpoints
from safety_net.cases import CASES


def main() -> None:
    """Write the answers of the cases named and say what moved; drop those of cases that are no more."""
    names = sys.argv[1:] or list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        sys.exit(f"no such case: {', '.join(unknown)}; there are: {', '.join(CASES)}")
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoints(Path(directory))
        for name in names:
            for difference in record(name, Path(directory)):
                sys.stdout.write(f"{name}: {difference}\n")
    for path in RECORDED.glob("*.json"):
        if path.stem not in CASES:
            path.unlink()


if __name__ == "__main__":
    main()
