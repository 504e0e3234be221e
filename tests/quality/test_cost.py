"""The cost model: it finds the rates that a device has, and none that are negative."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.bench.flops import LayerWork
from pipeline.model.shape import ModelShape
from pipeline.quality.cost import FEATURES, CostModel, Observation, dense_passes, features

SHAPE = ModelShape(layers=6, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=320, context=100_000)


def layer(rng, tokens):
    kind = rng.integers(5)
    ffn = int(rng.integers(1, tokens))
    return [
        LayerWork(tokens, tokens),
        LayerWork(tokens, ffn, scored_pairs=64 * tokens),
        LayerWork(tokens, tokens, ffn_fp8_tokens=ffn),
        LayerWork(tokens, tokens, pairs=int(rng.integers(tokens, tokens**2 // 2))),
        LayerWork(64, 64, pairs=64 * tokens, parked=tokens - 64),
    ][kind]


def planted_ms(passes, coefficients, linears=False):
    """The host launches while the device computes."""
    counts = features(SHAPE, passes, linears) * coefficients
    return float(max(counts[-2:].sum(), counts[:-2].sum()))


def observed(rng, coefficients, disturb=lambda ms: ms):
    tokens = int(rng.integers(100, 40_000))
    passes = [[layer(rng, tokens) for _ in range(int(rng.integers(1, 7)))]]
    linears = bool(rng.integers(2))
    ms = planted_ms(passes, coefficients, linears)
    return Observation(passes=passes, linears_in_fp8=linears, ttft_ms=disturb(ms))


@pytest.fixture
def planted():
    rates = [2e-9, 1e-9, 4e-9, 5e-9, 1e-11, 8e-9, 6e-9, 25.0, 10.0]
    assert len(rates) == len(FEATURES)
    return np.array(rates)


def test_planted_rates_are_found(planted):
    rng = np.random.default_rng(0)
    model = CostModel.fit(SHAPE, [observed(rng, planted) for _ in range(60)])
    assert model.coefficients == pytest.approx(planted, rel=1e-6)
    assert model.relative_error < 1e-9
    passes = dense_passes(SHAPE, 12_345)
    assert model.predict(passes, True) == pytest.approx(planted_ms(passes, planted, True))


def test_runs_that_compiled_a_kernel_do_not_spoil_it(planted):
    rng = np.random.default_rng(1)
    runs = [observed(rng, planted, lambda ms: ms * rng.uniform(0.97, 1.03)) for _ in range(100)]
    runs += [observed(rng, planted, lambda ms: ms + 900) for _ in range(5)]
    model = CostModel.fit(SHAPE, runs)
    clean = [observed(rng, planted) for _ in range(30)]
    off = [model.predict(o.passes, o.linears_in_fp8) / o.ttft_ms - 1 for o in clean]
    assert np.median(np.abs(off)) < 0.02
    assert model.relative_error < 0.04


def test_no_rate_is_negative(planted):
    rng = np.random.default_rng(2)
    # of noise alone, plain least squares would make some of them negative
    runs = [observed(rng, planted, lambda ms: float(rng.uniform(1, 2))) for _ in range(40)]
    model = CostModel.fit(SHAPE, runs)
    assert (model.coefficients >= 0).all()
    assert (model.coefficients > 0).any()


def test_what_was_never_seen_costs_nothing(planted):
    rng = np.random.default_rng(3)
    runs = [
        Observation(
            passes=(passes := dense_passes(SHAPE, int(tokens))),
            linears_in_fp8=False,
            ttft_ms=planted_ms(passes, planted),
        )
        for tokens in rng.integers(100, 30_000, 8)
    ]
    model = CostModel.fit(SHAPE, runs)
    assert model.relative_error < 1e-6
    unseen = [FEATURES.index(name) for name in ("scoring", "block-sparse attention")]
    assert not model.coefficients[unseen].any()
    assert CostModel.fit(SHAPE, []).predict(dense_passes(SHAPE, 100)) == 0


def test_short_prompts_that_wait_for_launches_say_nothing_of_long_ones(planted):
    """On a small model nearly all runs may be of such prompts, and few of any that are block-sparse."""
    planted[FEATURES.index("layers")] = 40.0
    runs = []
    for tokens in (2_000, 3_000, 5_000, 8_000, 20_000, 30_000) * 10:
        runs.append(dense_passes(SHAPE, tokens))
    for layer in range(SHAPE.layers):
        for share in (0.1, 0.3):
            works = list(dense_passes(SHAPE, 30_000)[0])
            works[layer] = works[layer]._replace(pairs=int(share * 30_000**2 / 2))
            runs.append([works])
    rng = np.random.default_rng(4)
    model = CostModel.fit(
        SHAPE,
        [
            Observation(
                passes=passes,
                linears_in_fp8=False,
                ttft_ms=planted_ms(passes, planted) * rng.uniform(0.98, 1.02),
            )
            for passes in runs
        ],
    )
    sparse = [[work._replace(pairs=int(0.2 * 30_000**2 / 2)) for work in dense_passes(SHAPE, 30_000)[0]]]
    for passes in (dense_passes(SHAPE, 4_000), dense_passes(SHAPE, 25_000), sparse):
        assert model.predict(passes) == pytest.approx(planted_ms(passes, planted), rel=0.1)
