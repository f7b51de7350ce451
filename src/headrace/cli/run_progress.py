"""How far a run is: loading, then the blocks of the first pass, then tokens. No run is silent for long.

`RunProgress` is told by hooks on the model's modules; a display shows it: a bar that is redrawn where standard error
is a terminal, a line now and then where it is not.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TextIO

from headrace.cli.output import Output
from headrace.units import format_number, format_seconds

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SLOW_PASS_S = 2.0
"""Passes that take longer than this show their blocks, too."""

RECENT_PASSES = 16
"""The rate that is shown is the mean over this many passes."""

FIRST_LINE_S = 2.0
LINES_APART_S = 10.0


class Share(NamedTuple):
    """What is done of a whole, and in words."""

    done: float
    whole: float
    words: str


class RunProgress:
    """Counts blocks and tokens of one run. `changed` is called after every change, in the thread that computes."""

    doing: str
    """what goes on before the first pass"""

    def __init__(self, doing: str, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.changed: Callable[[], None] = lambda: None
        self.doing = doing
        self._clock = clock
        self._started_s = clock()
        self._num_blocks = 0
        self._blocks_done = 0
        self._passes_done = 0
        self._tokens_each = 0
        self._sequences = 1
        self._prefill_s = self._decode_s = 0.0
        self._pass_ends: deque[float] = deque(maxlen=RECENT_PASSES + 1)

    def tell(self) -> None:
        """Let the display know that something changed."""
        self.changed()

    def follow(self, model: Any, *, tokens_each: int, sequences: int) -> None:
        """Count from now on what `model` does; `tokens_each` new tokens are wanted for each of its sequences."""
        handle = model.headrace
        self._num_blocks = handle.plan.num_blocks
        self._tokens_each, self._sequences = tokens_each, sequences
        self._prefill_s = handle.prediction.prefill_s
        self._decode_s = handle.prediction.decode_s_per_pass
        self._started_s = self._clock()
        head_pieces = self._num_blocks - len(handle.layers)
        for layer in handle.layers:
            layer.register_forward_hook(lambda *_: self._count_blocks(1))
        model.get_output_embeddings().register_forward_hook(lambda *_: self._count_blocks(head_pieces))
        model.register_forward_hook(lambda *_: self._count_pass())

    def _count_blocks(self, number: int) -> None:
        self._blocks_done += number
        self.changed()

    def _count_pass(self) -> None:
        self._blocks_done = 0
        self._passes_done += 1
        self._pass_ends.append(self._clock())
        self.changed()

    @property
    def share(self) -> Share:
        """What is done of the present phase."""
        if self._num_blocks == 0:
            elapsed = self._clock() - self._started_s
            return Share(0, 1, self.doing + (f" ({elapsed:.0f} s)" if elapsed >= 1 else ""))
        if self._passes_done == 0:
            return Share(self._blocks_done, self._num_blocks, self._prefill_words())
        return Share(self._passes_done, self._tokens_each, self._decode_words())

    def _prefill_words(self) -> str:
        elapsed = self._clock() - self._started_s
        left = max(0.0, self._prefill_s - elapsed)
        if self._blocks_done:
            left = elapsed / self._blocks_done * (self._num_blocks - self._blocks_done)
        words = f"first pass: {self._blocks_done} of {self._num_blocks} blocks, first token in {_about(left)}"
        return f"{words}, all in {_about(left + (self._tokens_each - 1) * self._decode_s)}"

    def _decode_words(self) -> str:
        pass_s = self._decode_s
        if len(self._pass_ends) > 1:
            pass_s = (self._pass_ends[-1] - self._pass_ends[0]) / (len(self._pass_ends) - 1)
        done = self._passes_done * self._sequences
        words = f"{done} of {self._tokens_each * self._sequences} tokens"
        if pass_s > 0:
            words += f", {format_number(self._sequences / pass_s)} tokens/s"
        since = self._clock() - self._pass_ends[-1]
        left = max(0.0, (self._tokens_each - self._passes_done) * pass_s - since)
        if pass_s > SLOW_PASS_S and self._blocks_done:
            words += f", block {self._blocks_done} of {self._num_blocks}"
        return f"{words}, about {_about(left)} left"


def _about(seconds: float) -> str:
    return format_seconds(float(f"{seconds:.2g}")) if seconds < 120 else format_seconds(seconds)


class Progress(Protocol):
    """What a display shows: how much is done, and a call for when that changed."""

    changed: Callable[[], None]

    @property
    def share(self) -> Share:
        """What is done of the present phase."""


class Display(Protocol):
    """Shows a run while it goes on, and puts the generated text where it belongs."""

    def write(self, text: str) -> None:
        """Show generated text at once."""


@contextmanager
def displayed(progress: Progress, output: Output) -> Iterator[Display]:
    """Show `progress` on standard error, and the text that is written on standard output, until the block ends."""
    console = output.to_stderr
    if not console.is_terminal or console.is_dumb_terminal:
        output.note(progress.share.words)
        lines = LineDisplay(progress, output)
        progress.changed = lines.tick
        yield lines
        return
    bar = BarDisplay(progress, console, output.stdout if output.one_terminal else None)
    with bar.drawn():
        yield bar if output.one_terminal else DirectText(output)


class DirectText:
    """Text goes straight to standard output."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def write(self, text: str) -> None:
        """Write and flush."""
        self._output.text(text)


class LineDisplay:
    """A line on standard error every ten seconds, the first one soon.

    Where both streams go to one file or pipe, there are no more lines once the text has begun, which shows the
    progress itself and would be cut up by them.
    """

    def __init__(self, progress: Progress, output: Output, clock: Callable[[], float] = time.perf_counter) -> None:
        self._progress = progress
        self._output = output
        self._clock = clock
        self._next_s = clock() + FIRST_LINE_S
        self._text_begun = False

    def write(self, text: str) -> None:
        """Write to standard output at once."""
        self._text_begun = True
        self._output.text(text)

    def tick(self) -> None:
        """Write a line if one is due."""
        now = self._clock()
        if now >= self._next_s and not (self._text_begun and self._output.one_file):
            self._next_s = now + LINES_APART_S
            self._output.note(self._progress.share.words)


class BarDisplay:
    """A bar that is redrawn five times a second below the text.

    Where text and bar share one screen, complete lines are printed above the bar, and the line that is still growing
    is drawn with it; it goes to standard output when the bar is gone.
    """

    def __init__(self, progress: Progress, console: Console, stdout: TextIO | None) -> None:
        from rich.live import Live

        self._progress = progress
        self._console = console
        self._stdout = stdout
        self._growing = ""
        self._live = Live(
            console=console,
            get_renderable=self._render,
            refresh_per_second=5,
            transient=True,
            redirect_stdout=False,
        )

    @contextmanager
    def drawn(self) -> Iterator[None]:
        """Draw until the block ends; whatever ends it, the terminal is left as it was and no text is lost."""
        try:
            with self._live:
                yield
        finally:
            if self._stdout is not None:
                self._stdout.write(self._growing)
                self._stdout.flush()

    def write(self, text: str) -> None:
        """Print complete lines above the bar; keep the rest."""
        from rich.text import Text

        *lines, self._growing = (self._growing + text).split("\n")
        for line in lines:
            self._console.print(Text(line), soft_wrap=True)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        share = self._progress.share
        row = Table.grid(padding=(0, 1))
        row.add_row(ProgressBar(total=share.whole, completed=share.done, width=24), Text(share.words))
        if not self._growing:
            return row
        shown = Text(self._growing).wrap(self._console, max(1, self._console.width))
        return Group(*shown[-max(1, self._console.height - 4) :], row)
