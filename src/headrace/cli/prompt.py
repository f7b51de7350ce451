"""The prompts of a run: read from options, files or standard input, and turned into token ids."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.errors import CheckpointError, InvalidRequestError
from headrace.inference.chat_template import ChatTemplate
from headrace.paths import user_path

if TYPE_CHECKING:
    import torch

STANDARD_INPUT = "-"
_PIPED = "standard input"
BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Prompts as one left-padded batch: tensors of shape (prompts, tokens of the longest)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    lengths: tuple[int, ...]
    """tokens of each prompt, padding not counted"""
    pad_token_id: int
    chat: bool
    """whether the chat template was put around the prompts"""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, which is the width of the batch."""
        return max(self.lengths)


def read_prompts(prompts: Sequence[str] | None, prompt_file: str | None) -> tuple[str, ...]:
    """Return the texts that `--prompt` or `--prompt-file` mean, or what standard input holds where it is no terminal.

    Raises InvalidRequestError where there are none.
    """
    if prompts and prompt_file is not None:
        raise InvalidRequestError("both --prompt and --prompt-file were given; give one of them")
    if prompt_file is not None:
        prompts = [_read_file(prompt_file)]
    elif prompts:
        prompts = [_read_file(text) if text == STANDARD_INPUT else text for text in prompts]
    else:
        prompts = _piped()
    if not prompts:
        raise InvalidRequestError(
            "there is no prompt; give --prompt TEXT or --prompt-file FILE, or pipe it to standard input"
        )
    for text in prompts:
        if not text.strip():
            raise InvalidRequestError("the prompt is empty; a model needs at least one token to go on from")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidRequestError("the prompt is not UTF-8 text; headrace reads no other encoding") from None
    return tuple(prompts)


def _piped() -> list[str]:
    """What standard input holds, unless somebody would have to type it, or it cannot be read."""
    if sys.stdin.isatty():
        return []
    try:
        data = sys.stdin.buffer.read()
    except OSError:
        return []
    return [_decoded(data, _PIPED)] if data else []


def _read_file(name: str) -> str:
    origin = _PIPED if name == STANDARD_INPUT else name
    try:
        data = sys.stdin.buffer.read() if name == STANDARD_INPUT else user_path(name).read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"the prompt file {origin} cannot be read: {error.strerror}") from error
    return _decoded(data, origin)


def _decoded(data: bytes, origin: str) -> str:
    try:
        return data.decode("utf-8-sig")  # without the byte order mark that some editors put first
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"the prompt in {origin} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error


def encode_prompts(
    tokenizer: Any, texts: Sequence[str], *, chat: bool | None, system: str | None, vocab_size: int
) -> PromptBatch:
    """Tokenize; `chat` None means: with the chat template where the tokenizer has one.

    Raises InvalidRequestError for a prompt without tokens or a template that refuses it, CheckpointError for a
    tokenizer that does not belong to the model.
    """
    import torch

    template = ChatTemplate(tokenizer)
    has_template = template.is_there
    if chat and not has_template:
        raise InvalidRequestError("--chat was given, but this model's tokenizer has no chat template; leave it out")
    chat = has_template if chat is None else chat
    if system is not None and not chat:
        why = "--no-chat was given" if has_template else "this model's tokenizer has no chat template"
        raise InvalidRequestError(f"--system needs a chat template to put it into, but {why}; leave it out")
    rows = []
    for text in texts:
        if not tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise InvalidRequestError(f"the prompt {text[:40]!r} has no tokens in this model's vocabulary")
        rows.append(_chat_ids(template, text, system) if chat else list(tokenizer(text)["input_ids"]))
    highest = max(max(row) for row in rows)
    if highest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer gives token {highest}, but the model knows {vocab_size} tokens; they do not belong together"
        )
    width = max(len(row) for row in rows)
    pad = _padding_token(tokenizer)
    return PromptBatch(
        input_ids=torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        lengths=tuple(len(row) for row in rows),
        pad_token_id=pad,
        chat=chat,
    )


def _chat_ids(template: ChatTemplate, text: str, system: str | None) -> list[int]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    try:
        return template.tokens(messages)
    except InvalidRequestError as error:
        remedy = "--no-chat" if system is None else "without --system, or with --no-chat"
        raise InvalidRequestError(f"{error}; try {remedy}") from error


def _padding_token(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def load_tokenizer(directory: Path, *, trust_remote_code: bool) -> Any:
    """Load a checkpoint's tokenizer; raises CheckpointError with the reason where there is no usable one."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizer files are parsed by several libraries, each with errors of its own
        if (directory / "config.json").is_file():
            from headrace.inference.skeleton import read_transformers_config

            read_transformers_config(directory, trust_remote_code=trust_remote_code)  # raises where this is at fault
        raise CheckpointError(
            f"the tokenizer in {directory} cannot be loaded (tokenizer.json or the like is expected there): {error}"
        ) from error
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        tokenizer.chat_template = tokenizer.chat_template.removeprefix(BYTE_ORDER_MARK)
    return tokenizer
