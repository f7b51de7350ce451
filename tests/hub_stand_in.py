"""A hub without a network: repositories are directories, and errors are raised as huggingface_hub raises them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

SHA = "a" * 40


class HubStandIn:
    """Takes the place of the calls of huggingface_hub that headrace makes; what needs the net raises `failure`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path, repository: Path) -> None:
        self.repository = repository
        self.failure: Exception | None = None
        self.asked: list[str] = []
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self._model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self._snapshot_download)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self._cached)
        self._cache = cache

    def _model_info(self, _hub_id: str, *, revision: str | None = None, files_metadata: bool) -> Any:
        assert files_metadata, "sizes are asked for"
        self._maybe_fail()
        files = sorted(path for path in self.repository.rglob("*") if path.is_file())
        names = [path.relative_to(self.repository).as_posix() for path in files]
        siblings = [
            SimpleNamespace(rfilename=name, size=path.stat().st_size) for name, path in zip(names, files, strict=True)
        ]
        return SimpleNamespace(sha=SHA, siblings=siblings)

    def _snapshot_download(
        self,
        hub_id: str,
        *,
        revision: str | None = None,
        local_dir: Path | None = None,
        allow_patterns: Sequence[str] = (),
        local_files_only: bool = False,
    ) -> str:
        snapshot = local_dir or self._snapshot(hub_id)
        if local_files_only:
            if not snapshot.is_dir():
                raise huggingface_hub.errors.LocalEntryNotFoundError("nothing is cached")
            return str(snapshot)
        self._maybe_fail()
        for name in allow_patterns:
            if not (snapshot / name).exists():
                self.asked.append(name)
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.repository / name, snapshot / name)
        return str(snapshot)

    def _snapshot(self, hub_id: str) -> Path:
        return self._cache / f"models--{hub_id.replace('/', '--')}" / "snapshots" / SHA

    def _cached(self, hub_id: str, name: str, *, revision: str | None) -> str | None:
        path = self._snapshot(hub_id) / name
        return str(path) if path.exists() else None

    def _maybe_fail(self) -> None:
        if self.failure is not None:
            raise self.failure
