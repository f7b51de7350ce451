"""What a run says of itself while it goes on."""

from __future__ import annotations

import io
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from headrace.cli.output import Output
from headrace.cli.run_progress import FIRST_LINE_S, LINES_APART_S, BarDisplay, LineDisplay, RunProgress


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeModel(nn.Module):
    """Three layers and a head in two pieces; each layer takes a second."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.layers = nn.ModuleList(nn.Identity() for _ in range(3))
        self.head = nn.Identity()
        self.headrace = SimpleNamespace(
            plan=SimpleNamespace(num_blocks=5),
            prediction=SimpleNamespace(prefill_s=5.0, decode_s_per_pass=4.0),
            layers=tuple(self.layers),
        )

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, hidden: torch.Tensor, stop_after: int = 3) -> torch.Tensor:
        for layer in list(self.layers)[:stop_after]:
            self.clock.now += 1.0
            hidden = layer(hidden)
        if stop_after < len(self.layers):
            raise InterruptedError
        return torch.as_tensor(self.head(hidden))


def said(progress: RunProgress) -> tuple[float, float, str]:
    done, whole, words = progress.share
    return done, whole, words


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(clock: Clock) -> RunProgress:
    return RunProgress("loading m", clock=clock)


def test_blocks_then_tokens_are_counted(clock: Clock, progress: RunProgress) -> None:
    assert progress.share.words == "loading m"
    clock.now = 3.0
    assert progress.share.words == "loading m (3 s)"
    model, hidden = FakeModel(clock), torch.zeros(1)
    progress.follow(model, tokens_each=4, sequences=2)
    assert said(progress) == (0, 5, "first pass: 0 of 5 blocks, first token in 5 s, all in 17 s")
    with pytest.raises(InterruptedError):
        model(hidden, stop_after=2)
    assert said(progress) == (2, 5, "first pass: 2 of 5 blocks, first token in 3 s, all in 15 s")


def test_rate_and_time_left_come_from_the_passes_themselves(clock: Clock, progress: RunProgress) -> None:
    model, hidden = FakeModel(clock), torch.zeros(1)
    progress.follow(model, tokens_each=4, sequences=2)
    model(hidden)
    assert said(progress) == (1, 4, "2 of 8 tokens, 0.5 tokens/s, about 12 s left")  # predicted: no pass to go by yet
    model(hidden)
    assert said(progress) == (2, 4, "4 of 8 tokens, 0.667 tokens/s, about 6 s left")
    with pytest.raises(InterruptedError):
        model(hidden, stop_after=1)
    assert said(progress) == (2, 4, "4 of 8 tokens, 0.667 tokens/s, block 1 of 5, about 5 s left")


def test_lines_are_sparse(clock: Clock, progress: RunProgress, capsys: pytest.CaptureFixture[str]) -> None:
    display = LineDisplay(progress, Output(), clock)
    for _ in range(1000):
        clock.now += 0.05
        display.tick()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + int((50 - FIRST_LINE_S) / LINES_APART_S)


class OneFile(Output):
    """Both streams in one file."""

    one_file = True


def test_no_line_cuts_up_the_text_of_a_file_that_holds_both(
    clock: Clock, progress: RunProgress, capsys: pytest.CaptureFixture[str]
) -> None:
    for output, lines in ((OneFile(), 1), (Output(), 2)):
        display = LineDisplay(progress, output, clock)
        clock.now += FIRST_LINE_S
        display.tick()
        display.write("so far")
        clock.now += LINES_APART_S
        display.tick()
        captured = capsys.readouterr()
        assert captured.out == "so far"
        assert len(captured.err.splitlines()) == lines


@pytest.mark.parametrize(("stderr", "expected"), [(subprocess.STDOUT, "True"), (subprocess.PIPE, "False")])
def test_one_file_is_recognised(stderr: int, expected: str) -> None:
    code = "from headrace.cli.output import Output; print(Output().one_file)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, text=True, check=True)
    assert done.stdout.strip() == expected


def bar(stdout: io.StringIO, progress: RunProgress, width: int = 40) -> tuple[Any, io.StringIO]:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, height=10)
    return BarDisplay(progress, console, stdout), screen


def test_the_growing_line_is_drawn_with_the_bar_and_kept_at_the_end(progress: RunProgress) -> None:
    stdout = io.StringIO()
    display, screen = bar(stdout, progress)
    with display.drawn():
        display.write("first li")
        display.write("ne\nsecond ")
        display.write("line")
    assert "first line" in screen.getvalue()
    assert stdout.getvalue() == "second line"


def test_an_interrupted_run_keeps_its_text(progress: RunProgress) -> None:
    stdout = io.StringIO()
    display, screen = bar(stdout, progress)

    def interrupted() -> None:
        with display.drawn():
            display.write("so far")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stdout.getvalue() == "so far"
    assert screen.getvalue().endswith("\x1b[2K")  # the bar is gone


def test_a_line_longer_than_the_screen_shows_its_end(progress: RunProgress) -> None:
    display, screen = bar(io.StringIO(), progress, width=20)
    with display.drawn():
        display.write(" ".join(f"word{number}" for number in range(200)))
        display._live.refresh()
        assert "word199" in screen.getvalue()
        assert "word20 " not in screen.getvalue()
