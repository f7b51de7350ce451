"""What is fetched from the hub, what is left there, and what is said when it cannot be had."""

from __future__ import annotations

import errno
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from headrace.errors import CheckpointError
from headrace.inference.sources import hub
from headrace.inference.sources.hub import fetch, needed_files
from hub_stand_in import SHA, HubStandIn
from tiny_models import save_tiny


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny("llama", tmp_path_factory.mktemp("hub") / "llama", dtype=torch.float32)
    (directory / "consolidated.00.safetensors").write_bytes(b"once more")
    (directory / "README.md").write_text("a card")
    (directory / "onnx").mkdir()
    (directory / "onnx" / "config.json").write_text("{}")
    return directory


@pytest.fixture
def stand_in(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubStandIn:
    return HubStandIn(monkeypatch, tmp_path / "cache", repository)


def needed(repository: Path) -> list[str]:
    return [path.name for path in repository.glob("*") if path.name.startswith(("model", "config", "generation"))]


def test_only_what_running_takes_is_fetched_and_only_once(
    stand_in: HubStandIn, repository: Path, tmp_path: Path
) -> None:
    first = fetch("owner/name")
    assert first.directory == tmp_path / "cache" / "models--owner--name" / "snapshots" / SHA
    assert sorted(path.name for path in first.directory.iterdir()) == sorted(needed(repository))
    assert (
        first.size_bytes
        == first.fetched_bytes
        == sum((repository / name).stat().st_size for name in needed(repository))
    )
    next(first.directory.glob("model-00002-*")).unlink()
    stand_in.asked.clear()
    again = fetch("owner/name")
    assert [name[:11] for name in stand_in.asked] == ["model-00002"]
    assert 0 < again.fetched_bytes < again.size_bytes == first.size_bytes
    elsewhere = fetch("owner/name", directory=tmp_path / "there")
    assert elsewhere.directory == tmp_path / "there"
    assert fetch("owner/name", directory=tmp_path / "there").fetched_bytes == 0


def test_of_weights_that_are_there_twice_one_is_fetched() -> None:
    own = ["consolidated.00.safetensors", "params.json", "tokenizer.model"]
    assert needed_files([*own, "model.safetensors", "a.gguf", "b.bin"]) == [*own[1:], "model.safetensors"]
    assert needed_files(own) == own
    assert needed_files(["additional_chat_templates/rag.jinja", "chat_template.jinja", "x/y.jinja"]) == [
        "additional_chat_templates/rag.jinja", "chat_template.jinja"
    ]  # fmt: skip


def test_what_is_fetched_is_told_while_it_comes(
    stand_in: HubStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The download ends when something was told of a file that grows in the cache."""
    told: list[tuple[int, int]] = []
    heard_of_it = threading.Event()

    def hear(here_bytes: int, missing_bytes: int) -> None:
        told.append((here_bytes, missing_bytes))
        if here_bytes:
            heard_of_it.set()

    def slow(_: str, **_options: Any) -> str:
        folder = tmp_path / "cache" / "models--owner--name" / "blobs"
        folder.mkdir(parents=True)
        (folder / "x.incomplete").write_bytes(bytes(40_000))
        assert heard_of_it.wait(60)
        return str(folder)

    monkeypatch.setattr(hub, "_SECONDS_APART", 0.001)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", slow)
    fetched = fetch("owner/name", heard=hear)
    assert told[-1][1] == fetched.fetched_bytes
    assert 40_000 <= told[-1][0] <= fetched.fetched_bytes


def answered(kind: type[Exception], status: int) -> Exception:
    """The library's error for an answer of this status, whichever HTTP library it brings."""
    error: Any = kind.__new__(kind)
    error.args, error.response = ("Client error",), SimpleNamespace(status_code=status)
    return error  # type: ignore[no-any-return]


REFUSALS: list[tuple[Exception, str]] = [
    (answered(errors.GatedRepoError, 403), r"accept its terms: do so at https://\S+/owner/name, then log in"),
    (answered(errors.RepositoryNotFoundError, 404), "there is no model owner/name at https://.*, or it is private"),
    (answered(errors.RevisionNotFoundError, 404), "has no revision 'v9'; see https://.*/owner/name/commits/main"),
    (answered(errors.HfHubHTTPError, 503), "does not answer .* not whole on this disk; try again later"),
    (answered(errors.HfHubHTTPError, 429), "could not be fetched from https://"),
    (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE keeps the hub from being asked; unset it"),
    (ConnectionError("no route"), r"does not answer \(no route\)"),
    (OSError(errno.ENOSPC, "No space left on device"), "is full; make room, or name another place: --dir DIR"),
    (PermissionError(errno.EACCES, "Permission denied"), "cannot be written: Permission denied; name another place"),
]


@pytest.mark.parametrize(("failure", "told"), REFUSALS, ids=lambda value: type(value).__name__)
def test_what_went_wrong_is_told_with_what_to_do(stand_in: HubStandIn, failure: Exception, told: str) -> None:
    stand_in.failure = failure
    with pytest.raises(CheckpointError, match=told):
        fetch("owner/name", revision="v9")


def test_what_is_whole_on_this_disk_needs_no_hub(stand_in: HubStandIn) -> None:
    whole = fetch("owner/name")
    stand_in.failure = ConnectionError("no route")
    here = fetch("owner/name")
    assert (here.directory, here.fetched_bytes) == (whole.directory, 0)
    assert here.remark == "the hub does not answer (no route); this was fetched before"
    next(whole.directory.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match="not whole on this disk"):
        fetch("owner/name")


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (
            ["config.json", "pytorch_model.bin"],
            r"pickled PyTorch files and no safetensors; .*save_pretrained\(DIRECTORY\)",
        ),
        (["a.Q4_K_M.gguf"], r"GGUF files and no safetensors; headrace plans those"),
        (["config.json"], "has no safetensors files"),
    ],
)
def test_a_repository_without_safetensors_is_refused(
    names: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        (tmp_path / "repository").mkdir(exist_ok=True)
        (tmp_path / "repository" / name).write_text("{}")
    HubStandIn(monkeypatch, tmp_path / "cache", tmp_path / "repository")
    with pytest.raises(CheckpointError, match=told):
        fetch("owner/name")
    assert not (tmp_path / "cache").exists()


def test_a_model_that_the_disk_has_no_room_for_is_not_begun(
    stand_in: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs \d+ KB more in .*, where 1.00 KB are free; make room"):
        fetch("owner/name")
    assert stand_in.asked == []


def test_files_that_nobody_will_finish_are_removed(tmp_path: Path) -> None:
    path, other = tmp_path / "blob.12345678.incomplete", tmp_path / "others.incomplete"
    other.touch()
    with path.open("wb"):
        hub.remove_unfinished()
    assert not path.exists()
    assert other.exists()
