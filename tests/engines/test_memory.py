"""How much memory a pack may take and how much it will: by arithmetic, for one method on one device."""

from __future__ import annotations

import pytest
import torch
from conftest import document, loaded

from pipeline.engines.memory import Packer
from pipeline.pruning.registry import make_method


@pytest.mark.parametrize(("wanted", "in_flight"), [(None, 1), (4, 1), (0, 0)])
def test_rows_of_a_method_that_holds_keys_itself_run_one_by_one_without_a_store(wanted, in_flight):
    packer = Packer.on(
        torch.device("cpu"),
        make_method("hip"),
        loaded().decoder.shape,
        itemsize=4,
        new_tokens=3,
        pack_tokens=None,
        in_flight=wanted,
    )
    rows = [document(10, seed=1), document(12, seed=2)]
    assert (packer.store_bytes, packer.in_flight) == (0, in_flight)
    assert packer.max_bytes == packer.all_bytes > packer.planned_bytes([12])
    assert [[row.prompt_tokens for row in pack] for pack in packer.packs(rows)] == [[12], [10]]
    assert all(map(packer.runs_alone, rows))
