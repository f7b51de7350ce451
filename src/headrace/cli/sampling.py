"""How the next token is chosen: the most likely one unless a sampling option is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headrace.errors import InvalidRequestError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Decoding options, checked. Greedy unless a temperature (other than 0), top-p or top-k is given."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    num_beams: int = 1
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature < 100:
            raise InvalidRequestError(f"--temperature must lie between 0 (greedy) and 100, not {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InvalidRequestError(f"--top-p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise InvalidRequestError(f"--top-k must be at least 1, not {self.top_k}")
        if self.num_beams < 1:
            raise InvalidRequestError(f"--num-beams must be at least 1, not {self.num_beams}")
        if self.temperature == 0 and (self.top_p is not None or self.top_k is not None):
            raise InvalidRequestError("--temperature 0 is greedy decoding, where --top-p and --top-k have no effect")
        if self.greedy and self.draws:
            raise InvalidRequestError(
                "--greedy takes the most likely token; --temperature, --top-p and --top-k have no place"
            )
        if self.seed is not None and not self.draws:
            raise InvalidRequestError(
                "--seed has no effect on greedy decoding; give --temperature, --top-p or --top-k too"
            )

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn at random."""
        return self.top_p is not None or self.top_k is not None or bool(self.temperature)

    def describe(self) -> str:
        """In a few words, for people and for the notes of a run."""
        if not self.draws:
            return "greedy" if self.num_beams == 1 else f"beam search with {self.num_beams} beams"
        names = ("temperature", "top_p", "top_k", "seed", "num_beams")
        given = ", ".join(f"{n.replace('_', '-')} {getattr(self, n)}" for n in names if getattr(self, n) is not None)
        return f"sampling: {given}"

    def generate_options(self) -> dict[str, Any]:
        """Arguments of the transformers `generate` method; those not given stay the model's own defaults."""
        options: dict[str, Any] = {"do_sample": self.draws, "num_beams": self.num_beams}
        if self.draws:
            drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
            options |= {name: value for name, value in drawn.items() if value is not None}
        return options


GREEDY = Sampling()
