"""What a batch job is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from headrace.errors import InvalidRequestError
from headrace.inference.load_options import LoadOptions
from headrace.paths import is_given, user_path


@dataclass(frozen=True, kw_only=True)
class BatchJobRequest:
    """A file of requests, where answers go, and how to compute them. Raises InvalidRequestError for invalid ones."""

    model: str
    input: Path
    output: Path
    options: LoadOptions = field(default_factory=LoadOptions)
    """`batch` and the numbers of tokens follow from the requests"""
    max_tokens: int = 128
    """new tokens of requests that do not say how many"""
    temperature: float = 0.0
    """of requests that name none"""
    model_defaults: bool = True
    """whether what the model's generation_config.json asks for is followed"""
    in_flight: int | None = None
    pass_tokens: int | None = None
    answer_share: float = 1.0
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name, number in (
            ("--max-tokens", self.max_tokens),
            ("--in-flight", self.in_flight),
            ("--pass-tokens", self.pass_tokens),
        ):
            if number is not None and number < 1:
                raise InvalidRequestError(f"{name} must be at least 1, not {number}")
        if not 0 <= self.temperature <= 2:
            raise InvalidRequestError(f"--temperature must lie between 0 (greedy) and 2, not {self.temperature}")
        if not 0 < self.answer_share <= 1:
            raise InvalidRequestError(f"--answer-share must be above 0 and at most 1, not {self.answer_share}")
        source, target = user_path(self.input), user_path(self.output)
        if not is_given(source):
            raise InvalidRequestError(f"there is no file {self.input}")
        if not source.is_file():
            raise InvalidRequestError(
                f"{self.input} is a pipe, but requests are read twice; write them to a file first"
            )
        if target.exists() and target.samefile(source):
            raise InvalidRequestError("input and output are the same file; give another output")
