"""`headrace.plan`: the answer for a model and a machine, however they are named; torch only to measure this machine."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from headrace import __version__
from headrace.accuracy.history import learn
from headrace.accuracy.history_file import read_history
from headrace.economics.sampling_cost import sampled_work
from headrace.errors import InvalidRequestError
from headrace.inference.sources.model_source import resolve_model
from headrace.machine.catalogue import find_machine
from headrace.machine.machine import Machine
from headrace.model.catalogue import find_model, in_catalogue
from headrace.model.config_fields import read_config
from headrace.model.formats import requantised
from headrace.model.model import Model
from headrace.model.safetensors_index import TensorIndex
from headrace.model.stored_model import build_stored_model
from headrace.paths import is_given, user_path
from headrace.planning.answer import PlanAnswer
from headrace.planning.answer_json import answer_json
from headrace.planning.planner import compare
from headrace.planning.scenario import Scenario
from headrace.planning.scenarios import PlanRequest, scenario_on
from headrace.planning.strategies import RUNNABLE
from headrace.units import format_age


class PlanKeywords(TypedDict, total=False):
    """The fields of `PlanRequest` as keywords of `headrace.plan`."""

    memory: str | int | None
    host_memory: str | int | None
    device: str
    batch: int
    prompt_tokens: int | None
    generate_tokens: int | None
    strategy: str
    dtype: str
    read_limit: str | float | None
    cpu_blocks: bool
    cache_on_host: bool
    draft_tokens: int | None
    acceptance: float | None
    expert_hit_rate: float | None
    fresh: bool


def plan(
    model: str | Path,
    *,
    machine: str | Path | Machine | None = None,
    weights: str | None = None,
    kv_bits: int | None = None,
    sampling: str | None = None,
    learned: bool = True,
    **asked: Unpack[PlanKeywords],
) -> dict[str, Any]:
    """Predict every strategy for a model on a machine: the object that `headrace plan --json` prints.

    `model` is a checkpoint's directory, a .gguf file, a config.json, a hub id or a name of the catalogue. `machine` is
    a name of the catalogue, a machine file, or a `Machine`; None measures this one with the model, which needs torch.
    `asked`, with the defaults of `PlanRequest`: the work is `batch` (1) sequences of `prompt_tokens` (500) and
    `generate_tokens` (500), fewer where the model's context is shorter; `memory` and `host_memory` are in bytes or text
    such as 8GiB; other names mean what they mean in `headrace plan`. Raises InvalidRequestError, CheckpointError,
    MachineError and their like.
    """
    changes = ModelChanges(weights=weights, kv_bits=kv_bits)
    request = PlanRequest(**asked)
    answer = plan_answer(model, machine=machine, request=request, changes=changes, sampling=sampling, learned=learned)
    return answer_json(answer, version=__version__)


@dataclass(frozen=True, kw_only=True)
class ModelChanges:
    """Other formats than a model has: of its weights, and of its keys and values."""

    weights: str | None = None
    kv_bits: int | None = None

    def applied(self, model: Model) -> Model:
        """The model with these formats; the same one where they are its own."""
        if self.weights is not None and self.weights != model.weight_format:
            model = requantised(model.plain(), self.weights)
        if self.kv_bits is not None and self.kv_bits / 8 != model.kv_element_bytes:
            model = model.plain().with_kv_element_bytes(self.kv_bits / 8)
        return model


def plan_answer(
    model: str | Path,
    *,
    machine: str | Path | Machine | None,
    request: PlanRequest,
    changes: ModelChanges | None = None,
    sampling: str | None = None,
    learned: bool = True,
) -> PlanAnswer:
    """Answer for a model and a machine, see `plan`."""
    changes = ModelChanges() if changes is None else changes
    if request.fresh and machine is not None:
        raise InvalidRequestError("--fresh measures this machine again, but --machine names one; leave one of them out")
    notes: tuple[str, ...] = ()
    multiplier = 1.0
    if sampling is not None:
        request = request.within(_load(model, changes).context_tokens)
        work, multiplier, why = sampled_work(request.workload, sampling)
        request, notes = request.doing(work), (why,)
    if machine is None and is_checkpoint(str(model)) and changes == ModelChanges():
        return _measured_with(resolve_model(model), request, notes, multiplier)
    origin = "this machine"
    if machine is None:
        from headrace.inference.api import probe

        described, source = probe(device=request.device), "measured just now"
    elif isinstance(machine, Machine):
        described, origin, source = machine, machine.name, machine.name
    else:
        described, origin, source = find_described(str(machine)), str(machine), str(machine)
        if described.is_calibrated and learned:
            described, lessons = learn(described, read_history())
            notes = (*notes, *(f"{lesson} (--no-learned keeps the file's)" for lesson in lessons))
    if described.is_calibrated and changes.kv_bits is not None:
        raise InvalidRequestError(
            f"--kv-bits does not apply to {origin}, which was measured: keys and values are kept in the compute dtype. "
            "Use --dtype"
        )
    scenario, own_notes = scenario_on(described, _load(model, changes), request, origin=origin)
    return _answer(scenario, request, notes=(*notes, *own_notes), source=source, multiplier=multiplier)


def find_described(text: str) -> Machine:
    """A machine file, or a name of the catalogue."""
    path = user_path(text)
    if not is_given(path) and (path.suffix == ".toml" or "/" in text):
        raise InvalidRequestError(f"--machine {text}: there is no such file")
    return find_machine(text)


def is_checkpoint(model: str) -> bool:
    """Whether MODEL is a directory with weights, or a hub id that is to be fetched: what the runtime can run."""
    path = user_path(model)
    if path.is_dir():
        return any(path.glob("*.safetensors")) or not (path / "config.json").is_file()
    is_a_file = path.is_file() or path.suffix in {".gguf", ".json"}
    return not is_a_file and "/" in model and not in_catalogue(model)


def _load(model: str | Path, changes: ModelChanges) -> Model:
    """The model by its headers, its config or its name."""
    if not is_checkpoint(str(model)):
        return changes.applied(find_model(str(model)))
    directory = resolve_model(model)
    index = TensorIndex.from_directory(directory)
    stored = build_stored_model(directory.resolve().name, read_config(directory / "config.json"), index)
    return changes.applied(stored)


def _answer(
    scenario: Scenario, request: PlanRequest, *, notes: tuple[str, ...], source: str, multiplier: float
) -> PlanAnswer:
    machine = scenario.described_machine
    return PlanAnswer(
        scenario=scenario,
        compared=compare(scenario, request.only),
        notes=notes,
        machine_name=machine.name,
        accelerator=machine.processor.name if machine.processor.device else "",
        source=source,
        token_multiplier=multiplier,
    )


def _measured_with(directory: Path, request: PlanRequest, notes: tuple[str, ...], multiplier: float) -> PlanAnswer:
    """Measure this machine with the model in `directory`, on the device that a run would take."""
    from headrace.inference.api import calibrated_for_planning

    if request.only is not None and request.only not in RUNNABLE:
        raise InvalidRequestError(
            f"--strategy {request.strategy}: a checkpoint on one computer runs as {', '.join(RUNNABLE)}; for "
            "other strategies name a machine that can do them (--machine 8xh100)"
        )
    if request.expert_hit_rate is not None:
        raise InvalidRequestError(
            "--expert-hit-rate: a checkpoint on this machine runs with a layer's experts all together; name a machine "
            "as well (--machine rtx-4090)"
        )
    found = calibrated_for_planning(directory, request)
    return PlanAnswer(
        scenario=found.scenario,
        compared=compare(found.scenario, request.only),
        notes=(*notes, *found.notes),
        machine_name=platform.node() or "this machine",
        accelerator=found.accelerator,
        source=f"measured {format_age(found.age_s)} with this model",
        token_multiplier=multiplier,
    )
