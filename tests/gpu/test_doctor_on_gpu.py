"""`marsinfer doctor` where there is a GPU: nothing broken, and what depends on the GPU really tried."""

from __future__ import annotations

import pytest
import torch

from pipeline.doctor.examine import examine
from pipeline.kernels.attention import choose_attention
from pipeline.kernels.fp8 import fp8_available

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def found():
    return {(probe.group, probe.name): finding for probe, finding in examine().findings}


def test_nothing_is_broken(found):
    assert {name: finding.text for name, finding in found.items() if finding.status == "broken"} == {}


def test_the_gpu_is_described(found):
    finding = found["machine", "gpu"]
    assert finding.status == "ok"
    assert finding.facts["name"] == torch.cuda.get_device_name(CUDA)
    capability = ".".join(map(str, torch.cuda.get_device_capability(CUDA)))
    assert finding.facts["compute_capability"] == capability
    assert 0 < finding.facts["memory_free_bytes"] <= finding.facts["memory_total_bytes"]
    assert finding.facts["driver"] is None or "." in finding.facts["driver"]


def test_one_backend_is_the_one_that_runs_take(found):
    sizes = {"heads": 28, "kv_heads": 4, "head_dim": 128}
    chosen, _ = choose_attention("auto", device=CUDA, dtype=torch.bfloat16, **sizes)
    taken = [name for (group, name), finding in found.items() if group == "attention backends"]
    taken = [name for name in taken if "--attention auto" in found["attention backends", name].text]
    assert chosen.name in taken
    assert found["attention backends", "sdpa"].status == "ok"


def test_precisions_and_kernels_are_tried_where_they_can_run(found):
    assert found["precisions", "float32"].status == found["precisions", "float16"].status == "ok"
    in_fp8 = found["precisions", "fp8 linear layers"]
    assert in_fp8.status == ("ok" if fp8_available(CUDA) is None else "absent"), in_fp8.text
    if found["versions", "triton"].status == "ok":
        sparse = found["kernels", "sparse attention"]
        assert sparse.status == "ok", sparse.text
        assert sparse.facts["off"] <= sparse.facts["tolerance"]
    if found["attention backends", "fa3"].status == "ok":
        assert found["kernels", "CUDA graphs"].status == "ok", found["kernels", "CUDA graphs"].text
