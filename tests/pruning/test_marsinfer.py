"""MarsInfer against a naive reference written straight from the paper's five steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from conftest import document, pack_of, tiny_model

from pipeline.errors import ConfigError
from pipeline.model.prefill import prefill
from pipeline.pruning.marsinfer import MarsInfer


def naive_kept_tokens(decoder, doc, start_layer, eta, window, prefix):
    """Stock layers with eager attention, whole weight matrices, a Python loop over sorted tokens."""
    body = decoder.model.model
    decoder.model.set_attn_implementation("eager")
    length = doc.prompt_tokens
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    kept_by_layer = []
    with torch.inference_mode():
        hidden = body.embed_tokens(torch.from_numpy(doc.input_ids))[None]
        rope = body.rotary_emb(hidden, torch.arange(length)[None])
        for index, layer in enumerate(body.layers):
            mixed, weights = layer.self_attn(layer.input_layernorm(hidden), rope, mask)
            hidden = hidden + mixed
            kept = set(range(length))
            if index >= start_layer:
                importance = weights[0, :, -window:, :].double().mean(dim=(0, 1)).tolist()
                kept = smallest_set(importance, eta)
                kept |= set(range(min(prefix, length))) | set(range(max(0, length - window), length))
            rows = sorted(kept)
            hidden[:, rows] += layer.mlp(layer.post_attention_layernorm(hidden[:, rows]))
            kept_by_layer.append(rows)
        logits = decoder.model.lm_head(body.norm(hidden))[0, -1]
    return kept_by_layer, logits


def smallest_set(importance, eta):
    chosen, mass, total = set(), 0.0, sum(importance)
    for token in sorted(range(len(importance)), key=lambda t: -importance[t]):
        if mass >= eta * total:
            break
        chosen.add(token)
        mass += importance[token]
    return chosen


@dataclass(frozen=True, kw_only=True)
class Recording(MarsInfer):
    """MarsInfer that remembers which tokens it chose."""

    chosen: list = field(default_factory=list)

    def select(self, layer, view, state):
        selection = super().select(layer, view, state)
        rows = view.all_indices if selection.ffn is None else selection.ffn
        self.chosen.append(
            [rows[(rows >= a) & (rows < b)].sub(a).tolist() for a, b in view.segments.ranges()]
        )
        return selection


@pytest.mark.parametrize("eta", [0.3, 0.8, 0.95])
def test_the_same_tokens_are_chosen_at_every_layer(decoder, sdpa, eta):
    settings = {"start_layer": 1, "eta": eta, "window": 7, "prefix": 5}
    documents = [document(150), document(9, seed=1), document(71, seed=2)]
    method = Recording(**settings)
    prefilled = prefill(decoder, sdpa, method, pack_of(*documents))
    pruned = 0
    for b, doc in enumerate(documents):
        expected, logits = naive_kept_tokens(decoder, doc, **settings)
        # of the last layer the last token alone is read, so nothing is chosen there
        assert [layer[b] for layer in method.chosen] == expected[:-1]
        assert (prefilled.logits_BV[b] - logits).abs().max() <= 1e-4
        assert [row[b] for row in prefilled.work.ffn()] == [*map(len, expected[:-1]), 1]
        pruned += sum(doc.prompt_tokens - len(rows) for rows in expected[:-1])
    assert pruned > 0  # not vacuous


def test_a_share_keeps_that_many_tokens_and_counts_the_protected_ones(sdpa):
    decoder = tiny_model("llama")
    method = MarsInfer(share=0.5, start_layer=1, window=10, prefix=10)
    work = prefill(decoder, sdpa, method, pack_of(document(101), document(24, seed=1))).work
    # ceil(50.5) = 51; of 24 tokens 20 are protected, more than the share's 12, and stay
    assert work.ffn() == [[101, 24], [51, 20], [51, 20], [1, 1]]


def test_a_setting_may_have_one_value_a_layer(sdpa):
    decoder = tiny_model("llama")
    method = MarsInfer(share=(0.25, 0.5, 1.0, 0.25), start_layer=1, window=4, prefix=4)
    work = prefill(decoder, sdpa, method, pack_of(document(100))).work
    assert work.ffn() == [[100], [50], [100], [1]]


def test_a_setting_of_the_wrong_depth_is_refused(sdpa):
    with pytest.raises(ConfigError, match=r"^eta has 2 values, and the model has 4 layers: give one value"):
        MarsInfer(eta=(0.9, 0.8), start_layer=1).plan(tiny_model("llama").shape, [10])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": -0.1}, "eta=-0.1 is out of range: it must be between 0 and 1"),
        ({"eta": 1.01}, "eta=1.01 is out of range: it must be between 0 and 1"),
        ({"eta": float("nan")}, "eta must be a number, not nan"),
        ({"share": 1.5}, "share=1.5 is out of range: it must be between 0 and 1"),
        ({"window": 0}, "window=0 is out of range: it must be at least 1"),
        ({"prefix": 1.5}, "prefix=1.5 is a count: give a whole number"),
        ({"start_layer": -1}, "start_layer=-1 is out of range: it must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        MarsInfer(**settings)
    assert str(caught.value) == message
