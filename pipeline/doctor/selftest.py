"""Pruned prefills of a tiny model: full settings must equal dense, small ones must prune."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from pipeline.bench.attention_speed import distance
from pipeline.doctor.findings import Finding
from pipeline.doctor.tiny import LAYERS, subject
from pipeline.model.prefill import Prefilled
from pipeline.pruning.base import PruningMethod
from pipeline.pruning.dense import Dense
from pipeline.pruning.operations import attended_pairs
from pipeline.pruning.registry import make_method

# with which a method prunes documents as short as these; "*" for every method that is not named
SMALL = {
    "*": {"start_layer": "1", "window": "6", "prefix": "4", "eta": "0.7"},
    "cascade": {"tokens": "16", "caches": "2", "sink": "4", "chunk": "8"},
    "fastkv": {"layer": "1", "share": "0.5", "kv_share": "0.3", "window": "4"},
    "gemfilter": {"keep": "7"},
    "hip": {"dense_below": "0", "keys": "64", "chunk": "8", "sink": "0", "window": "0", "last": "1"},
    "mars": {"last_full": "1", "window": "6"},
    "sliminfer": {"layers": "1,2,3", "budget": "0.6,0.4,0.2", "block": "8", "unit": "2"},
    "uniprefill": {"first_layer": "1", "every": "1", "p": "0.6", "block": "4", "sink": "3", "window": "5"},
}
# with which a method that has such a setting keeps every token
FULL = {
    "eta": 1.0,
    "share": 1.0,
    "budget": 1.0,
    "p": 1.0,
    "kv_share": 1.0,
    "keep": 1.0,
    "keys": 1 << 20,
    "tokens": 400,
    "last_full": LAYERS - 1,
    "sparse_attention": 1.0,
}
# of dense's logits, as `distance` reckons, by bits of the dtype: matrix shapes may differ, and so last bits
TOLERANCES = {32: 1e-4, 16: 0.1}


def small(name: str) -> PruningMethod:
    """A method with settings that prune short documents."""
    known = {field.name for field in fields(make_method(name))}
    settings = SMALL.get(name, SMALL["*"])
    return make_method(name, {key: value for key, value in settings.items() if key in known})


def full(method: PruningMethod) -> PruningMethod:
    """The same method with settings that keep everything."""
    known = {field.name for field in fields(method)}
    return replace(method, **{key: value for key, value in FULL.items() if key in known})


def method(name: str) -> Finding:
    """One method on this device: its full settings against dense, and a prefill that is really pruned."""
    tried, pruning = subject(), small(name)
    dense, whole, pruned = (tried.prefill(each) for each in (Dense(), full(pruning), pruning))
    off = distance(whole.logits_BV, dense.logits_BV)
    tolerance = TOLERANCES[tried.decoder.dtype.itemsize * 8]
    shares = {what: count(pruned) / count(dense) for what, count in COUNTED.items()}
    facts = {
        "off": off,
        "tolerance": tolerance,
        "ffn_share": shares["FFN tokens"],
        "pairs_share": shares["query-key pairs"],
    }
    left_out = [(what, share) for what, share in shares.items() if share < 1]
    faults = []
    if not off <= tolerance:
        faults.append(f"with full settings it is off dense by {off:.3g}, more than {tolerance:g}")
    if not torch.isfinite(pruned.logits_BV).all():
        faults.append("a pruned prefill gives logits that are not finite")
    if name != Dense.name and not left_out:
        faults.append("a prefill that should be pruned is not")
    if faults:
        return Finding("broken", "; ".join(faults), facts)
    if name == Dense.name:
        return Finding("ok", f"the same when run again ({off:.2g})", facts)
    what, share = left_out[0]
    text = f"with full settings within {tolerance:g} of dense ({off:.2g}); pruned, {share:.0%} of {what}"
    return Finding("ok", text, facts)


def ffn_tokens(prefilled: Prefilled) -> int:
    """Tokens that passed feed-forward networks, of all documents, passes and layers."""
    passes = (layers for document in prefilled.by_document() for layers in document)
    return sum(work.ffn_tokens for layers in passes for work in layers)


def pairs(prefilled: Prefilled) -> int:
    """Query-key pairs of attention, likewise."""
    passes = (layers for document in prefilled.by_document() for layers in document)
    return sum(attended_pairs(work) for layers in passes for work in layers)


COUNTED = {"FFN tokens": ffn_tokens, "query-key pairs": pairs}
