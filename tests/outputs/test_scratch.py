"""Space for what is not to be kept, which may be full or missing."""

from __future__ import annotations

import tempfile

import pytest
from faults.places import Folder

from pipeline.errors import StorageError
from pipeline.outputs.rowindex import scratch_index


def test_a_full_disk_is_told_in_a_line(tmp_path):
    with (
        pytest.raises(StorageError, match=r"^scratch space cannot be used: .*; let TMPDIR name a folder"),
        Folder(tmp_path, ".parquet").away(),
        scratch_index(),
    ):
        pass


def test_a_folder_that_is_gone_is_told_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(StorageError, match=r"^there is no scratch space: No such file"), scratch_index():
        pass


def test_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_index():
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
