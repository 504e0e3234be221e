"""Outputs in object storage: what is refused before any work, and how they get there."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_storage import put

from pipeline.errors import ConfigError
from pipeline.inputs.columns import Columns
from pipeline.inputs.source import open_source
from pipeline.outputs.writing import check_output
from pipeline.storage.remote import place_of

pytestmark = pytest.mark.slow


def test_large_outputs_are_uploaded_in_pieces(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.storage.remote.UPLOAD_BYTES", 5 << 20)
    (tmp_path / "large").write_bytes(os.urandom(11 << 20))
    path = place_of(f"{bucket}/large")
    path.upload(tmp_path / "large")
    assert path.read_bytes() == (tmp_path / "large").read_bytes()


def test_outputs_are_checked(bucket, tmp_path):
    def refused(path, inputs=(), error=ConfigError, overwrite=False):
        with pytest.raises(error) as caught:
            check_output(path, inputs, overwrite)
        return str(caught.value)

    output = put(f"{bucket}/a.parquet", pq_bytes(tmp_path))
    files = open_source([output], Columns()).files
    assert refused(output, files, overwrite=True) == f"{output} is also an input; name another output"
    foreign = f"{output} exists, and marsinfer did not write it: name another output"
    assert refused(output) == refused(output, overwrite=True) == foreign
    check_output(f"{bucket}/b.parquet", files, False)
    check_output(tmp_path / "b.parquet", files, False)
    assert "has an extension that is not known" in refused(f"{bucket}/b.csv")
    for url in ("https://x/out.parquet", "hf://datasets/me/x/out.parquet"):
        scheme = url.partition(":")[0]
        assert refused(url) == (
            f"{url} cannot be an output: {scheme}:// cannot lock it against a second run; "
            "write to a file, s3:// or gs://, and copy it"
        )


def pq_bytes(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    return (tmp_path / "x.parquet").read_bytes()
