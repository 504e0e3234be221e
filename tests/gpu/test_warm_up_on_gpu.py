"""After the warm-up no document, of whatever length, compiles a kernel."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILY_SETTINGS, SIZES, document

from pipeline.checkpoints.building import random_model
from pipeline.engines import warm_up
from pipeline.engines.local import LocalEngine
from pipeline.families.decoder import Decoder
from pipeline.generation.generated import StopRules
from pipeline.generation.sampling import Sampling
from pipeline.kernels.attention import choose_attention
from pipeline.model.loading import LoadedModel
from pipeline.pruning.registry import make_method

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda", 0)
LENGTHS = (8192, 16384, 9001, 32768, 12345)
SPARSE_FROM = 4096  # tokens: on a model as small as this, block-sparse attention pays for longer ones alone
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 64}


def gpu_engine(name, **settings):
    sizes = {**SIZES, **FAMILY_SETTINGS["qwen3"], "num_attention_heads": 4, "head_dim": 64}
    sizes["max_position_embeddings"] = 65536
    decoder = Decoder(random_model("qwen3", sizes, device=CUDA, dtype=torch.bfloat16))
    attention, _ = choose_attention("auto", device=CUDA, dtype=torch.bfloat16, **HEADS)
    attention.sparse_from = SPARSE_FROM
    model = LoadedModel(
        decoder=decoder,
        tokenizer=SimpleNamespace(decode=lambda tokens, **_: ""),
        attention=attention,
        generation_config=None,
        name="tiny",
        fingerprint="",
    )
    rules = StopRules(max_new_tokens=3)
    return LocalEngine(model, make_method(name, settings), rules=rules, sampling=Sampling(), pack_tokens=1)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("mars", {}), ("marsinfer", {"start_layer": 1}), ("uniprefill", {"first_layer": 1})],
)
def test_no_length_compiles_a_kernel_after_the_warm_up(name, settings, monkeypatch):
    triton = pytest.importorskip("triton")
    engine = gpu_engine(name, **settings)
    try:
        assert warm_up.warm_up(engine, 60, prompts=[document(9000)])
        compiled = []
        hook = "jit_post_compile_hook"
        monkeypatch.setattr(triton.knobs.runtime, hook, lambda **told: compiled.append(told["repr"]))
        rows = [engine.answer([document(length, seed=length)])[0] for length in LENGTHS]
    finally:
        engine.close()
    assert [row.status for row in rows] == ["ok"] * len(LENGTHS)
    assert compiled == []
    if name == "mars":
        assert all(row.attention_ratio < 1 for row in rows)


def test_packs_of_the_first_window_are_prefilled_beforehand(monkeypatch):
    engine = gpu_engine("mars")
    seen, real = [], type(engine.prefiller).run

    def run(self, jobs, *given, **more):
        seen.append([job.document.prompt_tokens for job in jobs])
        return real(self, jobs, *given, **more)

    monkeypatch.setattr(type(engine.prefiller), "run", run)
    try:
        assert warm_up.warm_up(engine, 60, prompts=[document(9001, seed=n, row=n) for n in range(10)])
    finally:
        engine.close()
    assert seen == [[9001]]
