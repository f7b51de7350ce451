"""headrace itself, under the same command line, clock and report as its rivals."""

from __future__ import annotations

from measured_run import PassClock, argument_parser, parse_task

import headrace


def main() -> None:
    """Load, generate and report."""
    task = parse_task(argument_parser(__doc__, dtypes=("bfloat16",)))
    if not task.memory_bytes:
        raise SystemExit("headrace needs --memory-bytes: the memory that it may use")
    clock = PassClock(task)
    model = headrace.load(
        task.model, memory=task.memory_bytes, batch=task.batch, max_tokens=task.prompt_tokens + task.generate
    )
    clock.loaded()
    clock.begin()
    # To be fitted to headrace's API: `on_pass` is to be called after each pass, when its tokens are known.
    tokens = model.generate(
        task.prompts(), max_new_tokens=task.generate, ignore_eos=True, on_pass=lambda *_: clock.token()
    )
    clock.write_report(
        rival="headrace",
        version=f"headrace {headrace.__version__}",
        tokens=[[int(token) for token in row[-task.generate :]] for row in tokens],
        settings={},
    )


if __name__ == "__main__":
    main()
