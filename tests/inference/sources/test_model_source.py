"""What a MODEL argument means: a directory, a name of the catalogue that cannot be run, a hub id."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

from headrace.errors import CheckpointError
from headrace.inference.sources.model_source import resolve_model


def test_a_directory_is_taken_even_where_a_catalogue_entry_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt-3").mkdir()
    assert resolve_model("gpt-3") == Path("gpt-3")


@pytest.mark.parametrize("name", ["gpt-3", "GPT-3", "gpt-3*1000", "llama-3-8b@int4"])
def test_a_name_of_the_catalogue_is_explained(name: str) -> None:
    with pytest.raises(CheckpointError, match="is a catalogue entry") as caught:
        resolve_model(name)
    assert f"headrace plan {name} --machine NAME" in str(caught.value)
    assert "no weights to run" in str(caught.value)


def test_other_names_are_no_hub_ids() -> None:
    with pytest.raises(CheckpointError, match="'nowhere' is no hub id"):
        resolve_model("nowhere")


@pytest.mark.parametrize(("name", "planned"), [("meta-llama/Llama-3-8B", True), ("nobody/nothing", False)])
def test_a_hub_that_does_not_answer_is_no_dead_end_for_what_can_be_planned(
    name: str, planned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_options: object) -> str:
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match="no route to the hub") as caught:
        resolve_model(name)
    assert (f"headrace plan {name} --machine NAME needs no weights" in str(caught.value)) is planned
