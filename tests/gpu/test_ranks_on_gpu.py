"""A model divided between two GPUs gives what one gives, up to rounding, and decodes by CUDA graphs."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from pipeline.bench.inputs import random_document
from pipeline.families.projection import LinearPrecision
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.model.graphs import DecodeStats
from pipeline.model.loading import open_model
from pipeline.model.prefill import Pack, prefill
from pipeline.pruning.mars import Mars
from pipeline.settings.model_settings import ModelSettings

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("linears", ["auto", "fp8", "mixed"])
def test_two_gpus_give_what_one_gives(linears):
    logits, rules, stats = [], StopRules(max_new_tokens=40), DecodeStats()
    for count in (1, 2):
        opened = open_model(ModelSettings(model="random:qwen2.5-1.5b"), count)
        with closing(opened.load(LinearPrecision(linears=linears))) as model:
            documents = [random_document(model, tokens, tokens) for tokens in (12_288, 3000, 700)]
            pack = Pack.of(documents, model.device)
            made = prefill(model.decoder, model.attention, Mars(), pack, 40)
            logits.append(made.logits_BV.cpu())
            if count == 2:
                answers = decode(model.decoder, model.attention, made, rules, stats=stats)
                assert [len(each.tokens) for each in answers] == [40] * 3
    one, two = logits
    assert ((one - two).norm(dim=-1) / one.norm(dim=-1)).max() < 0.1
    assert stats.replayed_steps > 0
    assert stats.failure is None
