"""A pruned prefill and decode written plainly: one document, stock transformers layers, eager attention.

What a method chooses comes from a function written in each test file straight from the method's steps. All
indices in a `Choice` count the tokens that entered the layer; all tokens in a `Trace` are original places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules


@dataclass
class Seen:
    """A layer after its attention; n tokens are left of the document."""

    layer: int
    length: int  # of the prompt
    tokens: list[int]  # original places of the n tokens
    queries: Tensor  # (H, n, d) float64, with RoPE
    keys: Tensor  # (K, n, d)
    weights: Tensor  # (H, n, n) softmax attention


@dataclass
class Choice:
    """None means all tokens that entered."""

    live: list[int] | None = None
    ffn: list[int] | None = None
    cache: list[list[int]] | None = None  # of each key/value head


@dataclass
class Stored:
    """Stands where transformers has its cache: keys and values of each layer, (1, K, C, d)."""

    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def update(self, k, v, layer, *_, **__):  # releases differ in what else they pass
        if layer in self.keys:
            k, v = torch.cat((self.keys[layer], k), 2), torch.cat((self.values[layer], v), 2)
        self.keys[layer], self.values[layer] = k, v
        return k, v

    def keep_only(self, layer, places_by_head):
        for kept in (self.keys, self.values):
            heads = [kept[layer][0, head, places] for head, places in enumerate(places_by_head)]
            kept[layer] = torch.stack(heads)[None]


@dataclass
class Trace:
    """What happened to one document, layer by layer."""

    entered: list[list[int]] = field(default_factory=list)
    ffn: list[list[int]] = field(default_factory=list)
    cached: list[list[list[int]]] = field(default_factory=list)  # of each layer and key/value head
    stored: Stored = field(default_factory=Stored)
    logits: Tensor | None = None  # (vocabulary,)


@torch.inference_mode()
def naive_prefill(
    decoder, ids: Tensor, choose: Callable[[Seen], Choice], tokens: list[int] | None = None
) -> Trace:
    """Of all of a prompt, or of its `tokens` alone at the places that they have in it."""
    body, trace = decoder.model.model, Trace()
    tokens = list(range(len(ids))) if tokens is None else tokens
    ids = ids[tokens]
    decoder.model.set_attn_implementation("eager")
    hidden = body.embed_tokens(ids)[None]
    for index, layer in enumerate(body.layers):
        n = len(tokens)
        mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
        rope = body.rotary_emb(hidden, torch.tensor(tokens)[None])
        normed = layer.input_layernorm(hidden)
        queries = rotated_queries(layer.self_attn, normed, rope)
        mixed, weights = layer.self_attn(normed, rope, mask, past_key_values=trace.stored)
        hidden = hidden + mixed
        keys = trace.stored.keys[index][0].double()
        choice = choose(Seen(index, len(ids), tokens, queries, keys, weights[0].double()))
        everything = list(range(n))
        live = everything if choice.live is None else choice.live
        ffn = everything if choice.ffn is None else choice.ffn
        cache = choice.cache or [everything] * len(keys)
        trace.stored.keep_only(index, cache)
        trace.entered.append(tokens)
        trace.cached.append([[tokens[place] for place in places] for places in cache])
        trace.ffn.append([tokens[place] for place in ffn])
        hidden[:, ffn] += layer.mlp(layer.post_attention_layernorm(hidden[:, ffn]))
        hidden, tokens = hidden[:, live], [tokens[place] for place in live]
    trace.logits = decoder.model.lm_head(body.norm(hidden))[0, -1]
    return trace


def rotated_queries(attention, normed, rope):
    """(H, n, d) in float64."""
    queries = attention.q_proj(normed).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, "q_norm"):
        queries = attention.q_norm(queries)
    queries = queries.transpose(1, 2)
    return apply_rotary_pos_emb(queries, queries, *rope)[0][0].double()


@torch.inference_mode()
def naive_decode(decoder, trace: Trace, position: int, new_tokens: int) -> list[int]:
    """Greedy tokens after a prefill, the first of them from its logits; `position` is that token's."""
    body = decoder.model.model
    answer = [int(trace.logits.argmax())]
    while len(answer) < new_tokens:
        hidden = body.embed_tokens(torch.tensor(answer[-1:]))[None]
        rope = body.rotary_emb(hidden, torch.tensor([[position + len(answer) - 1]]))
        for layer in body.layers:
            normed = layer.input_layernorm(hidden)
            hidden = hidden + layer.self_attn(normed, rope, None, past_key_values=trace.stored)[0]
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        answer.append(int(decoder.model.lm_head(body.norm(hidden))[0, -1].argmax()))
    return answer


def generated(decoder, attention, prefilled, new_tokens: int) -> list[list[int]]:
    """Greedy tokens of each document, by the code under test."""
    rules = StopRules(max_new_tokens=new_tokens)
    return [answer.tokens for answer in decode(decoder, attention, prefilled, rules)]


class Watched:
    """Passes everything on to a method, and notes each document's tokens as a `Trace` has them."""

    def __init__(self, method):
        self.method, self.entered, self.ffn, self.restarted = method, [], [], None

    def __getattr__(self, name):
        return getattr(self.method, name)

    def select(self, layer, view, state):
        selection = self.method.select(layer, view, state)
        if selection.restart is not None:
            self.restarted = by_document(view, selection.restart)
            self.entered, self.ffn = [], []
            return selection
        self.entered.append(by_document(view, view.all_indices))
        passes = selection.live if selection.ffn is None else selection.ffn
        self.ffn.append(by_document(view, view.all_indices if passes is None else passes))
        return selection


def by_document(view, indices):
    tokens = [indices[(indices >= a) & (indices < b)] for a, b in view.segments.ranges()]
    return [view.positions[places].tolist() for places in tokens]


def assert_same(trace: Trace, watched: Watched, prefilled, b: int) -> None:
    """Document `b` of a pack went the way of its trace: tokens, stored keys and values, logits."""
    asked = prefilled.work.last_only.count(False)  # a method may not care what the last layer does
    assert asked in (len(trace.entered), len(trace.entered) - 1)
    assert [layer[b] for layer in watched.entered] == trace.entered[:asked]
    assert [layer[b] for layer in watched.ffn] == trace.ffn[:asked]
    assert [layer[b] for layer in prefilled.work.kept] == list(map(len, trace.entered))
    # whatever passes the last layer's FFN, the last token's alone is read
    assert [layer[b] for layer in prefilled.work.ffn()] == [*map(len, trace.ffn[:-1]), 1]
    assert (prefilled.logits_BV[b] - trace.logits).abs().max() <= 1e-4
    cache = prefilled.cache
    for layer, slots in enumerate(cache.slots):
        place = slice(slots.starts[b], slots.starts[b] + slots.used[b])
        for ours, naive in ((cache.keys, trace.stored.keys), (cache.values, trace.stored.values)):
            expected = naive[layer][0].transpose(0, 1)
            assert ours[layer][place].shape == expected.shape
            assert (ours[layer][place] - expected).abs().max() <= 1e-4


def left_out(traces: list[Trace]) -> int:
    """How often a token did not enter a layer or did not pass its FFN: more than 0, or a test is vacuous."""
    rows = [(trace.entered[0], row) for trace in traces for row in trace.entered[1:] + trace.ffn]
    return sum(len(everything) - len(row) for everything, row in rows)


def best(scores: list[float], count: int) -> set[int]:
    """Places of the `count` largest scores; of equal ones the earlier."""
    return set(sorted(range(len(scores)), key=lambda place: -scores[place])[:count])


def pooled(scores: list[float], width: int) -> list[float]:
    """Mean over `width` neighbours, of which those beyond the ends count as zero."""
    reach = width // 2
    return [sum(scores[max(0, t - reach) : t + reach + 1]) / width for t in range(len(scores))]
