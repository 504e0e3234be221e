"""Pruned prefills of a tiny model: full settings must equal dense, small ones must prune."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from pipeline.bench.attention_speed import distance
from pipeline.doctor.findings import Finding
from pipeline.doctor.tiny import LAYERS, Subject, subject
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.model.prefill import Pack, Prefilled, prefill
from pipeline.pruning.base import PruningMethod
from pipeline.pruning.capabilities import StepSkips, step_skips
from pipeline.pruning.dense import Dense
from pipeline.pruning.operations import attended_pairs
from pipeline.pruning.registry import make_method

# with which a method prunes documents as short as these; "*" for every method that is not named
SMALL = {
    "*": {"start_layer": "1", "window": "6", "prefix": "4", "eta": "0.7"},
    "cascade": {"tokens": "16", "caches": "2", "sink": "4", "chunk": "8"},
    "ffn-skip": {"threshold": "-1", "warm_up": "0"},
    "fastkv": {"layer": "1", "share": "0.5", "kv_share": "0.3", "window": "4"},
    "frugal": {"keep": "0.4", "layer": "1", "judges": "20", "sink": "2", "window": "5", "most": "8"},
    "gemfilter": {"keep": "7"},
    "hip": {"dense_below": "0", "keys": "64", "chunk": "8", "sink": "0", "window": "0", "last": "1"},
    "mars": {"last_full": "1", "window": "6"},
    "sliminfer": {"layers": "1,2,3", "budget": "0.6,0.4,0.2", "block": "8", "unit": "2"},
    "speculative": {
        "keep": "0.3",
        "chunk": "8",
        "look_ahead": "3",
        "pool": "3",
        "sink": "2",
        "window": "5",
        "most": "8",
    },
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
    "threshold": 2.0,
    "keys": 1 << 20,
    "tokens": 400,
    "last_full": LAYERS - 1,
    "sparse_attention": 1.0,
}
STEPS = 4  # of decoding, of a method that prunes those
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
    if (rule := step_skips(pruning, tried.decoder.shape)) is not None:
        shares["FFN tokens"] = 1 - skipped_share(tried, pruning, rule)
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


def skipped_share(tried: Subject, pruning: PruningMethod, rule: StepSkips) -> float:
    """Of feed-forward networks in decode steps of the first document, of which the rule leaves some out."""
    pack = Pack.of([tried.documents[0]], tried.decoder.device)
    prefilled = prefill(tried.decoder, tried.attention, pruning, pack, STEPS + 1)
    (answer,) = decode(
        tried.decoder, tried.attention, prefilled, StopRules(max_new_tokens=STEPS + 1), skips=rule
    )
    return sum(answer.skipped_ffns) / (STEPS * tried.decoder.shape.layers)


def ffn_tokens(prefilled: Prefilled) -> int:
    """Tokens that passed feed-forward networks, of all documents, passes and layers."""
    passes = (layers for document in prefilled.by_document() for layers in document)
    return sum(work.ffn_tokens for layers in passes for work in layers)


def pairs(prefilled: Prefilled) -> int:
    """Query-key pairs of attention, likewise."""
    passes = (layers for document in prefilled.by_document() for layers in document)
    return sum(attended_pairs(work) for layers in passes for work in layers)


COUNTED = {"FFN tokens": ffn_tokens, "query-key pairs": pairs}
