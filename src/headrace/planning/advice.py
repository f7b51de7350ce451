"""What would make the recommended arrangement faster, found by planning again with one thing changed."""

from __future__ import annotations

from dataclasses import replace

from headrace.errors import HeadraceError
from headrace.machine.machine import Machine
from headrace.machine.quantity import Quantity
from headrace.model.formats import requantised
from headrace.planning.comparison import Answer, Question, answer, evaluate
from headrace.units import format_seconds

_WORTH = 0.97
"""a change that leaves more than this share of the time is not worth a sentence"""


def remedies(question: Question, best: Answer) -> list[str]:
    """Sentences, the most helpful first: faster parts, more tokens per pass, fewer bits."""
    now_s = best.decode_s_per_pass.expected
    found: list[tuple[float, str]] = []
    for what, machine in _faster_machines(question.machine):
        try:
            changed = evaluate(replace(question, machine=machine), best.arrangement)
        except HeadraceError:
            continue
        found.append((changed.decode_s_per_pass.expected / now_s, f"{what} of twice the speed"))
    try:
        narrow = requantised(question.model, "int4")
        if narrow.weights_bytes < 0.9 * question.model.weights_bytes:
            changed_answer = answer(replace(question, model=narrow), best.strategy)
            if isinstance(changed_answer, Answer):
                found.append((changed_answer.decode_s_per_pass.expected / now_s, "weights in 4 bits"))
    except HeadraceError:
        pass
    sentences = [
        f"{what.capitalize()} would make a pass {format_seconds(share * now_s)} instead of {format_seconds(now_s)}."
        for share, what in sorted(found)
        if share < _WORTH
    ]
    free = _free_tokens(question, best)
    if free:
        sentences.append(free)
    return sentences or [f"It waits for {best.binds}; no single part of twice the speed would help by 3 % or more."]


def _free_tokens(question: Question, best: Answer) -> str:
    """Whether twice the batch costs nearly nothing."""
    work = replace(question.work, sequences=2 * question.work.sequences)
    try:
        doubled = answer(replace(question, work=work), best.strategy)
    except HeadraceError:
        return ""
    if not isinstance(doubled, Answer):
        return ""
    gain = doubled.tokens_per_s.expected / best.tokens_per_s.expected
    if gain < 1.1:
        return ""
    return f"A batch of {work.sequences} would bring {gain:.2f} times the tokens per second."


def _faster_machines(machine: Machine) -> list[tuple[str, Machine]]:
    processor = machine.processor
    found = [
        (
            "device memory",
            replace(machine, processor=replace(processor, memory_bytes_per_s=processor.memory_bytes_per_s.times(2))),
        ),
        (
            "arithmetic",
            replace(
                machine,
                processor=replace(processor, flops={name: _doubled(rate) for name, rate in processor.flops.items()}),
            ),
        ),
    ]
    words = {"host": "a host link", "scale_up": "a link between devices", "network": "a network"}
    for role, what in words.items():
        if role in machine.links:
            path = {link.name for link in machine.path(role)}
            links = {
                name: replace(link, bytes_per_s=_doubled(link.bytes_per_s)) if name in path else link
                for name, link in machine.links.items()
            }
            found.append((what, replace(machine, links=links)))
    if machine.disk is not None:
        faster = replace(machine.disk, bytes_per_s=_doubled(machine.disk.bytes_per_s))
        found.append(("a disk", replace(machine, disk=faster)))
    if machine.host is not None:
        host = replace(
            machine.host,
            memory_bytes_per_s=_doubled(machine.host.memory_bytes_per_s),
            flops=_doubled(machine.host.flops),
        )
        found.append(("a host memory and processor", replace(machine, host=host)))
    return found


def _doubled(rate: Quantity) -> Quantity:
    return rate.times(2)
