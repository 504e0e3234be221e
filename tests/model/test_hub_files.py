"""What is fetched from the hub, whether there is room for it, and how often the hub is asked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.checkpoints import hub as hub_models
from pipeline.errors import ModelError


def test_too_little_room_is_told_before(monkeypatch, tmp_path):
    monkeypatch.setattr(hub_models.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    listed = {"a": hub_models.HubFile(8, "x"), "b": hub_models.HubFile(3, "y")}
    with pytest.raises(ModelError, match=r"no room in .* \(0.0 GB are needed, 0.0 are free\)"):
        hub_models._check_room("org/x", tmp_path, listed.values())
    blobs = tmp_path / "models--org--x" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "y").write_bytes(b"")
    hub_models._check_room("org/x", tmp_path, listed.values())


def test_a_hub_that_stays_ill_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(hub_models, "WAITS_S", (0.0, 0.0))
    calls = []

    def act():
        calls.append(1)
        error = hub_models.NO_ANSWER("ill")
        error.response = SimpleNamespace(status_code=503)
        raise error

    with pytest.raises(hub_models.NO_ANSWER) as caught:
        hub_models._patiently(act)
    assert len(calls) == 3
    assert (
        hub_models._why("a/b", "main", caught.value) == "the hub answers with an error, 503; try again later"
    )


def test_the_code_of_a_model_is_fetched_where_it_may_run():
    names = [
        "config.json",
        "modeling_own.py",
        "deep/other.py",
        "additional_chat_templates/rag.jinja",
        "vocab.txt",
    ]
    kept = ["additional_chat_templates/rag.jinja", "config.json", "vocab.txt"]
    assert hub_models._small(names, with_code=False) == kept
    assert hub_models._small(names, with_code=True) == sorted([*kept, "modeling_own.py"])


def test_a_large_download_is_told(tmp_path):
    listed = {"model.safetensors": hub_models.HubFile(14_240_000_000, "x")}
    found = hub_models.HubModel(name="org/x", revision="main", commit="c", folder=tmp_path, files=listed)
    assert found._size_notes() == ("14.2 GB of org/x are downloaded from the hub before the first row",)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert found._size_notes() == ()
