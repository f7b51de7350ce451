"""What costs more than greedy decoding, each with its derivation: the larger workload that stands for it.

Two numbers matter and differ. The *token multiplier* counts the tokens that are computed for each one that is handed
over. How much longer it takes is predicted from the workload, since more sequences at once are not more passes: below
the critical batch (docs/formulas.md, section 2) a pass over eight sequences takes hardly longer than one over a single
sequence, while more tokens one after the other always take as many more passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from headrace.errors import InvalidRequestError, near_names
from headrace.planning.workload import Workload

GREEDY = "greedy"
SPECULATIVE = "speculative"
_MOST_SIDE_BY_SIDE, _MOST_IN_TURN = 10_000, 1_000


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way of sampling whose cost is that of a larger workload."""

    name: str
    counts: str
    """what the number after the colon counts"""
    side_by_side: bool
    """more sequences in the same passes, their prompt read once; False: more tokens one after another"""
    derivation: str
    tokens_per_unit: float = 1.0
    """tokens computed per token of the answer for each unit of the number: beside the answer's own where they come one
    after another"""
    delivers_all: bool = False
    """every text computed is handed over"""

    def computed(self, number: int) -> float:
        """Tokens computed for each token of one answer."""
        return self.tokens_per_unit * number + (0.0 if self.side_by_side else 1.0)

    def multiplier(self, number: int) -> float:
        """Tokens computed for each token handed over."""
        return 1.0 if self.delivers_all else self.computed(number)

    def work(self, work: Workload, number: int) -> Workload:
        """The workload that is decoded."""
        if self.side_by_side:
            return replace(work, sequences=work.sequences * round(self.computed(number)))
        return replace(work, generate_tokens=round(work.generate_tokens * self.computed(number)))


_PARALLEL = (
    "{n} texts per prompt are decoded side by side: {n} times the tokens and {n} times the cache of what is written; "
    "the prompt is read once and its cache shared. A pass carries {n} tokens per prompt, so where reading weights "
    "binds it takes hardly longer, and {n} times as long once arithmetic or the cache binds. "
)

SAMPLING: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="best-of",
            counts="texts, the best of which is kept",
            side_by_side=True,
            derivation=_PARALLEL
            + "Choosing by the model's own probabilities costs nothing more; a separate judge would "
            "read every text once, a prefill of {n} times prompt and answer.",
        ),
        Method(
            name="samples",
            counts="texts, all of which are handed over",
            side_by_side=True,
            delivers_all=True,
            derivation=_PARALLEL + "All are handed over, so a token is no dearer than a greedy one and often cheaper.",
        ),
        Method(
            name="majority",
            counts="chains of reasoning whose answers are counted (self-consistency)",
            side_by_side=True,
            derivation=_PARALLEL + "Counting the answers costs nothing. The chains are counted as answer tokens.",
        ),
        Method(
            name="beams",
            counts="beams",
            side_by_side=True,
            derivation=_PARALLEL + "Ranking {n} times the vocabulary is small beside the head's product. A beam that "
            "dies takes over another's cache: free with a paged cache, otherwise up to one copy of it per token (not "
            "counted). All must go in step, so none ends early.",
        ),
        Method(
            name="revise",
            counts="rounds of critique and rewriting",
            side_by_side=False,
            tokens_per_unit=2.0,
            derivation="A draft, then {n} times a critique as long as the text and the text anew: 1 + 2 x {n} times "
            "the tokens, one after another, so as many more passes at any batch; the context grows by all of them, and "
            "attention and cache with it. What was written is in the cache, so nothing is read again.",
        ),
        Method(
            name="think",
            counts="tokens of reasoning per token of the answer",
            side_by_side=False,
            derivation="{n} tokens of reasoning come before each token of the answer: 1 + {n} times the tokens and "
            "passes, one after another, and a context that grows with them.",
        ),
    )
}


def sampled_work(work: Workload, text: str) -> tuple[Workload, float, str]:
    """Read `best-of:4`; return the workload to predict, the tokens computed per token handed over, and why.

    The workload repeats a shared prompt's prefill for each text, which overstates the first pass. Raises
    InvalidRequestError for an unknown method or a number without sense.
    """
    name, _, counted = text.strip().lower().partition(":")
    known = (*SAMPLING, SPECULATIVE)
    if name == GREEDY and not counted:
        return work, 1.0, "Greedy decoding: one text, one token per sequence and pass."
    if name not in known:
        raise InvalidRequestError(
            f"there is no way of sampling {text!r}; {near_names(name, known)}known: {GREEDY}, "
            + ", ".join(f"{each}:N" for each in known)
        )
    method = SAMPLING.get(name)
    if not counted.isascii() or not counted.isdigit():
        counts = "draft tokens" if method is None else method.counts
        raise InvalidRequestError(f"{text!r}: write {name}:N, a whole number of {counts}")
    number = int(counted)
    if method is None:
        raise InvalidRequestError(
            f"{text!r}: speculative decoding changes the passes, not the work; ask for it with --draft-tokens {number}"
        )
    most = _MOST_SIDE_BY_SIDE if method.side_by_side else _MOST_IN_TURN
    if not 1 <= number <= most:
        raise InvalidRequestError(f"{text!r}: the number must lie between 1 and {most:,}")
    return method.work(work, number), method.multiplier(number), method.derivation.format(n=number)
