"""A layer's decode step by its own kernels, against the separate operations, and captured in a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from pipeline.checkpoints.building import random_model
from pipeline.families import decoder as decoder_module
from pipeline.families import projection
from pipeline.families.decoder import Decoder
from pipeline.kernels.fp8 import fp8_available
from pipeline.kernels.kv_fp8 import KvTarget

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda", 0)
ROWS = [1, 3, 64, 200]
SLOTS = 512
SIZES = {
    "hidden_size": 640,
    "intermediate_size": 1808,
    "num_hidden_layers": 3,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
}
MODELS = {
    "qwen2": {},  # groups of seven heads, a bias of queries, keys and values alone
    "llama": {"num_attention_heads": 2, "head_dim": 128, "attention_bias": True, "mlp_bias": True},
    "qwen3": {},  # whose norms of heads leave its steps to the separate operations
}


class Step:
    """All layers for a token of each row, from the same state each time."""

    def __init__(self, decoder, rows):
        shape, generator = decoder.shape, torch.Generator(device=CUDA).manual_seed(rows)
        sizes = SLOTS, shape.kv_heads, shape.head_dim

        def normal(*sizes):
            return torch.randn(*sizes, generator=generator, device=CUDA).to(decoder.dtype)

        self.decoder, self.start, self.hidden = (
            decoder,
            normal(rows, shape.hidden),
            normal(rows, shape.hidden),
        )
        self.keys, self.values = ([normal(*sizes) for _ in range(shape.layers)] for _ in "kv")
        self.places = torch.randperm(SLOTS, generator=generator, device=CUDA)[:rows]
        self.positions = torch.randint(0, 2000, (rows,), generator=generator, device=CUDA)
        self.groups = shape.heads // shape.kv_heads

    def run(self):
        """Returns the queries of each layer, which share no memory."""
        self.hidden.copy_(self.start)
        rope, queries, normed = self.decoder.rope(self.hidden, self.positions), [], None

        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):

            def attend(q_BHd, keys=keys, values=values):
                queries.append(q_BHd.clone())
                new = keys.index_select(0, self.places) + values.index_select(0, self.places)
                return q_BHd + new.repeat_interleave(self.groups, dim=1)

            arguments = KvTarget(keys, values, self.places), attend, normed
            normed = self.decoder.step_layer_(layer, self.hidden, rope, *arguments)
        return queries

    def results(self):
        queries = self.run()
        new = [x.index_select(0, self.places) for x in (*self.keys, *self.values)]
        return [x.clone() for x in (self.hidden, *queries, *new)]


def cuda_decoder(family, linears="auto"):
    decoder = Decoder(random_model(family, {**SIZES, **MODELS[family]}, device=CUDA, dtype=torch.bfloat16))
    for parameter in decoder.model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    for layer in decoder._layers:  # biases lie joined besides
        for part in (layer.qkv, layer.output, layer.gate_up, layer.down):
            if part.bias is not None:
                part.bias.normal_(std=0.3)
    if linears == "fp8" and (reason := fp8_available(CUDA)):
        pytest.skip(reason)
    decoder.use_linears(linears, keep=True)
    return decoder


def separately(monkeypatch, step):
    with monkeypatch.context() as patch:
        patch.setattr(decoder_module, "has_kernels", lambda x: False)
        return step.results()


def distances(results, others):
    pairs = zip(results, others, strict=True)
    return [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs]


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("family", MODELS)
def test_in_bf16_it_agrees_with_the_separate_operations(monkeypatch, family, rows):
    step = Step(cuda_decoder(family), rows)
    expected = separately(monkeypatch, step)
    assert max(distances(step.results(), expected)) < 0.005


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_in_fp8_it_is_as_near_to_bf16_as_the_separate_operations(monkeypatch, family, rows):
    decoder = cuda_decoder(family, "fp8")
    step, calls, product = Step(decoder, rows), [], projection.fp8_product
    row_wise = separately(monkeypatch, step)
    monkeypatch.setattr(projection, "fp8_product", lambda *x: calls.append(x) or product(*x))
    results = step.results()
    assert len(calls) == 4 * SIZES["num_hidden_layers"]
    decoder.use_linears("auto")
    exact = separately(monkeypatch, step)
    near, far, apart = (
        distances(*pair) for pair in ((results, exact), (row_wise, exact), (results, row_wise))
    )
    # the first layer's queries, keys and values differ by roundings to bfloat16, and by those later what is
    # quantised
    layers = SIZES["num_hidden_layers"]
    assert max(apart[1], apart[1 + layers], apart[1 + 2 * layers]) < 0.006
    assert max(apart) < 0.13
    assert sum(near) < 1.3 * sum(far)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("linears", ["auto", "fp8"])
def test_it_can_be_captured(linears, rows):
    step = Step(cuda_decoder("qwen2", linears), rows)
    stream = torch.cuda.Stream(CUDA)
    stream.wait_stream(torch.cuda.current_stream(CUDA))
    with torch.cuda.stream(stream):
        expected = step.results()
    torch.cuda.synchronize()
    for buffer in (step.hidden, *step.keys, *step.values):
        buffer.fill_(7)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step.results()
    for _turn in range(2):
        for result in captured:
            result.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        for result, wanted in zip(captured, expected, strict=True):
            assert torch.equal(result, wanted)
    changed = (step.keys[0] != 7).flatten(1).any(1).nonzero().flatten()
    assert changed.tolist() == sorted(step.places.tolist())
