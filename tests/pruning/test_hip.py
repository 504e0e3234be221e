"""HiP's choice and attention against a plain version of its steps, a token at a time, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import document, loaded, pack_of, tiny_model

from pipeline.errors import ConfigError
from pipeline.evaluate.predicting import generate, score_answer
from pipeline.generation.generated import StopRules
from pipeline.kernels import sparse
from pipeline.kernels.attention import SdpaAttention
from pipeline.model.prefill import prefill
from pipeline.pruning.dense import Dense
from pipeline.pruning.hip import Hip
from pipeline.pruning.memories.hip_choice import ChunkStage
from pipeline.pruning.memories.hip_memory import HipLayer, HipMemory
from pipeline.pruning.memories.key_memory import MemoryNeeds, Rotation
from pipeline.pruning.operations import attended_pairs

HEADS, KV_HEADS, WIDTH, BLOCK = 4, 2, 8, 64
CHUNKS = {
    8: (ChunkStage(256, 512), ChunkStage(32, 192), ChunkStage(8, 64)),
    64: (ChunkStage(256, 512), ChunkStage(64, 128)),
}
NEAR = {"sink": 64, "window": 128}
SMALL = {"keys": 64, "dense_below": 0, **NEAR}
SHAPE = tiny_model("qwen2").shape  # whose context is 512


def rotation(positions):
    angles = torch.arange(positions).double()[:, None] * torch.logspace(0, -2, WIDTH // 2).double()
    angles = torch.cat((angles, angles), dim=1)
    return Rotation(kinds=("rope",), tables={"rope": (angles.cos(), angles.sin())})


def turned(x, position):
    angles = position * torch.logspace(0, -2, WIDTH // 2).double()
    first, second = x[: WIDTH // 2], x[WIDTH // 2 :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin))


def qkv(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(tokens, heads, WIDTH, generator=generator, dtype=torch.float64) * 2
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


def chosen_by_hand(queries, keys, stop, of):
    """The first keys of one head's chunks; `keys` are of one head, `queries` those of a block."""
    starts, size = list(range(of.sink, stop, 256)), 256
    for number, stage in enumerate(of.stages):
        starts = [s for start in starts for s in range(start, min(start + size, stop), stage.chunk)]
        size = stage.chunk
        asking = queries if number + 1 == len(of.stages) else queries.view(16, 4, WIDTH).mean(1)
        scores = {}
        for start in starts:
            low, high, best = start, min(start + size, stop), -math.inf
            while True:
                middle = (low + high) // 2
                left, right = (
                    float((asking @ keys[at]).max()) for at in ((low + middle) // 2, (middle + high) // 2)
                )
                best = max(best, left, right)
                if high - low <= 1:
                    break
                low, high = (middle, high) if right > left else (low, middle)
            scores[start] = best
        starts = sorted(sorted(starts, key=lambda start: -scores[start])[: stage.keep // size])
    return starts


def by_hand(q, k, v, of, first, end, *, context_holds):
    """(Q, H, d) what the queries from `first` to `end` get that choose, one after the other."""
    out = torch.zeros(end - first, HEADS, WIDTH, dtype=torch.float64)
    for block in range(first // BLOCK, -(-end // BLOCK)):
        stop = max(0, block * BLOCK - of.window)
        places = [min(max(at, first), end - 1) for at in range(block * BLOCK, (block + 1) * BLOCK)]
        for head in range(HEADS):
            keys, values = k[:, head // 2], v[:, head // 2]
            if context_holds:
                asking = torch.stack([turned(q[at, head], at) for at in places])
                keys = torch.stack([turned(key, at) for at, key in enumerate(keys[:end])])
            else:
                asking = torch.stack([turned(q[at, head], of.window + 1) for at in places])
            starts = chosen_by_hand(asking, keys, stop, of)
            far = [*range(min(of.sink, stop)), *(at for s in starts for at in range(s, s + of.chunk))]
            for at in range(max(first, block * BLOCK), min(end, (block + 1) * BLOCK)):
                read = [*far, *range(stop, at + 1)]
                if context_holds:
                    query, near = turned(q[at, head], at), keys[read]
                else:
                    near = torch.stack([turned(keys[key], place) for place, key in enumerate(read)])
                    query = turned(q[at, head], len(read) - 1)
                weights = (near @ query / math.sqrt(WIDTH)).softmax(0)
                out[at - first, head] = weights @ values[read]
    return out


def memory(tokens, context, chunk, refresh=8, new_tokens=0, last=0):
    needs = MemoryNeeds(
        shape=replace(SHAPE, context=context, heads=HEADS, kv_heads=KV_HEADS, head_dim=WIDTH),
        length=tokens,
        new_tokens=new_tokens,
        dtype=torch.float64,
        device=torch.device("cpu"),
        attention=SdpaAttention(),
        rotation=rotation,
    )
    layers = (HipLayer(CHUNKS[chunk], **NEAR),)
    return HipMemory(needs, layers, dense_below=0, last=last, refresh=refresh), layers[0]


@pytest.mark.parametrize(("context", "chunk"), [(4096, 8), (4096, 64), (512, 8), (512, 64)])
def test_blocks_read_what_is_chosen_by_hand(context, chunk):
    tokens, first = 1000, 960 if context < 1000 else 832
    q, k, v = qkv(tokens)
    held, of = memory(tokens, context, chunk)
    held.attend(0, q[:first], k[:first], v[:first])
    before = held.pairs[0]
    attended = held.attend(0, q[first:], k[first:], v[first:])
    expected = by_hand(q, k, v, of, first, tokens, context_holds=context > tokens)
    assert (attended - expected).abs().max() < 1e-10
    far = 64 + 64 * (1 + (chunk == 64))
    near = sum(at + 1 - max(0, at // BLOCK * BLOCK - 128) for at in range(first, tokens))
    assert held.pairs[0] - before == (tokens - first) * far + near


def test_the_kernel_of_blocks_reads_the_same(monkeypatch):
    tokens = 1000
    gathered, _ = memory(tokens, 4096, 64)
    listed, _ = memory(tokens, 4096, 64)
    expected = gathered.attend(0, *qkv(tokens))
    monkeypatch.setattr(sparse, "has_kernels", lambda x: True)
    assert (listed.attend(0, *qkv(tokens)) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("context", [4096, 512])
def test_chunks_of_the_prompt_give_what_the_whole_does(context):
    tokens = 700
    q, k, v = qkv(tokens)
    (whole, _), (parted, _) = (memory(tokens, context, 8, last=64) for _ in range(2))
    parts = [parted.attend(0, q[a:b], k[a:b], v[a:b]) for a, b in ((0, 128), (128, 640), (640, tokens))]
    assert (torch.cat(parts) - whole.attend(0, q, k, v)).abs().max() < 1e-10
    assert whole.pairs == parted.pairs


def test_the_answers_tokens_choose_in_turns():
    tokens, more = 700, 5
    q, k, v = qkv(tokens + more)
    held, of = memory(tokens, 512, 8, refresh=3, new_tokens=more)
    held.attend(0, q[:tokens], k[:tokens], v[:tokens])
    estimated = []
    for at in range(tokens, tokens + more):
        attended = held.attend(0, q[at : at + 1], k[at : at + 1], v[at : at + 1])
        estimated.append(held.estimated_pairs[0])
        if at in (tokens, tokens + 3):  # who choose for themselves
            expected = by_hand(q, k, v, of, at, at + 1, context_holds=False)
            assert (attended - expected).abs().max() < 1e-10
    assert estimated[0] == estimated[1] == estimated[2] < estimated[3] == estimated[4]


@pytest.mark.parametrize("parts", [((0, 641),), ((0, 640), (640, 641))], ids=str)
@pytest.mark.parametrize("asked", [641, 1], ids=["all layers", "last layer"])
def test_what_a_lone_token_of_the_prompt_chose_is_not_the_answers(parts, asked):
    """As the last one of a prompt is alone in the last layer, and in all where its chunk has no others."""
    tokens, more = 641, 2
    q, k, v = qkv(tokens + more)
    held, of = memory(tokens, 512, 8, refresh=8, new_tokens=more)
    for a, b in parts:
        held.attend(0, q[max(a, b - asked) : b], k[a:b], v[a:b])
    attended = held.attend(0, q[tokens : tokens + 1], k[tokens : tokens + 1], v[tokens : tokens + 1])
    expected = by_hand(q, k, v, of, tokens, tokens + 1, context_holds=False)
    assert (attended - expected).abs().max() < 1e-10


def test_the_last_layer_chooses_anew_in_each_chunk():
    tokens, of_chunks = 640, []
    q, k, v = qkv(tokens)
    for parts in (((0, 640),), ((0, 576), (576, 640))):
        held, _ = memory(tokens, 512, 8, refresh=100)
        of_chunks.append([held.attend(0, q[b - 1 : b], k[a:b], v[a:b]) for a, b in parts][-1])
    assert (of_chunks[0] - of_chunks[1]).abs().max() < 1e-10


def test_the_last_queries_read_all_within_the_context():
    tokens = 700
    q, k, v = qkv(tokens)
    held, _ = memory(tokens, 4096, 8, last=64)
    dense, _ = memory(tokens, 4096, 8, last=tokens)
    got, expected = held.attend(0, q, k, v), dense.attend(0, q, k, v)
    assert (got - expected)[-64:].abs().max() < 1e-10
    assert (got - expected)[448:-64].abs().amax((1, 2)).min() > 1e-6


@pytest.mark.parametrize("settings", [{}, {"dense_below": 0, "keys": 512, "last": 0}], ids=str)
def test_who_keeps_everything_is_dense(decoder, sdpa, settings):
    pack, method = pack_of(document(450), document(90, seed=1)), Hip(**settings)
    dense, hip = (prefill(decoder, sdpa, each, pack, 4) for each in (Dense(), method))
    assert (dense.logits_BV - hip.logits_BV).abs().max() <= 1e-4
    assert [work.pairs for work in hip.by_document()[0][0]][:3] == [450 * 451 // 2] * 3
    model, answer = loaded(decoder), [1, 2, 3, 4]
    of_dense, of_hip = (score_answer(model, each, document(450), answer)[0] for each in (Dense(), method))
    assert abs(of_dense.logprobs - of_hip.logprobs).max() <= 1e-4


def test_a_document_beyond_the_context_is_read():
    model = loaded(tiny_model("qwen3"))
    method = Hip(**SMALL)
    prefilled = prefill(model.decoder, model.attention, method, pack_of(document(1500)), 6)
    assert torch.isfinite(prefilled.logits_BV).all()
    ((work, *_),) = prefilled.by_document()[0]
    assert attended_pairs(work) < 1500 * (64 + 64 + 128 + 64)
    answer = generate(model, method, document(1500), StopRules(max_new_tokens=6))
    assert len(answer.tokens) == 6
    assert answer.first == int(prefilled.logits_BV.argmax())


@pytest.mark.parametrize("refresh", [1, 3])
def test_an_answer_beyond_the_context_is_forced_as_it_is_generated(refresh):
    """Given together its tokens choose keys one by one too, without looking at those behind them."""
    model, method = loaded(tiny_model("qwen3")), Hip(**SMALL, refresh=refresh)
    tokens = generate(model, method, document(700), StopRules(max_new_tokens=8)).tokens
    forced, _, _ = score_answer(model, method, document(700), tokens)
    assert forced.choices.tolist() == tokens
    held, _ = memory(700, 512, 8, refresh, new_tokens=8)
    beside, _ = memory(700, 512, 8, refresh, new_tokens=8)
    q, k, v = qkv(708)
    for each in (held, beside):
        each.attend(0, q[:700], k[:700], v[:700])
    together = held.attend(0, q[700:], k[700:], v[700:])
    apart = [beside.attend(0, q[at : at + 1], k[at : at + 1], v[at : at + 1]) for at in range(700, 708)]
    assert (together - torch.cat(apart)).abs().max() < 1e-10
    assert held.pairs == beside.pairs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk": 12}, "chunk=12 must be one of 8, 16, 32, 64"),
        ({"window": 100}, "window=100 must be a multiple of 64"),
        ({"sparse_attention": 0.9}, "method hip chooses keys by itself: it takes no sparse_attention"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError) as caught:
        Hip(**settings)
    assert str(caught.value) == message


def test_a_context_without_room_for_what_is_read(sdpa):
    method = Hip(dense_below=0)
    assert method.longest(SHAPE) == SHAPE.context
    with pytest.raises(
        ConfigError, match=r"^method hip reads 512 tokens, prompt and answer, and these are 600: "
    ):
        prefill(tiny_model("qwen2"), sdpa, method, pack_of(document(600)))


def test_what_the_prompt_stores_is_told_once_the_answer_is_there():
    model = loaded(tiny_model("qwen2"))
    _, prefilled, _ = score_answer(model, Hip(**SMALL), document(300), [1, 2, 3])
    assert prefilled.cache.own_tokens() == [[300]] * 4
    assert prefilled.cache.used(0) == [303] * 4
