"""What a run comes to, against the same numbers computed naively."""

from __future__ import annotations

import numpy as np
import pytest
from report_outputs import LAYERS, METADATA, answered, failed, write

from pipeline.report.figures import configuration, figures_of, headline, milliseconds, phases
from pipeline.report.layer_shares import SAMPLED
from pipeline.report.output_reading import opened


def figures(path):
    with opened([str(path)]) as (run,):
        return figures_of(run)


def test_headline_figures_are_those_of_the_rows(tmp_path):
    rows = [answered(n) for n in range(41)]
    told = [failed(100, message=f"<i>first {n}</i>") for n in range(5)]
    found = figures(
        write(tmp_path / "out.parquet", [*rows, *told, failed(200, "bad_text", status="skipped")])
    )
    told = dict(headline(found))
    tokens = np.array([row.prompt_tokens for row in rows])
    assert told["rows"] == "47"
    assert told["answered"] == "41 (87.2%)"
    assert told["errors"] == "5 (10.6%)"
    assert told["skipped"] == "1 (2.1%)"
    assert told["prompt tokens"] == f"{tokens.sum():,}"
    assert told["TTFT p50"] == milliseconds(np.percentile([row.ttft_ms for row in rows], 50))
    assert told["prefill"] == "10,000 tokens/s"
    shares = np.array([row.ffn_ratio for row in rows])
    assert found.share("ffn_ratio") == pytest.approx((shares * tokens).sum() / tokens.sum())
    assert found.errors["over_long"].count == 5
    assert [message for *_, message in found.errors["over_long"].first] == [
        f"<i>first {n}</i>" for n in range(3)
    ]
    assert phases(found)[0] == ("queue", 3.0, 3.0)


def test_rows_that_a_guard_had_run_dense_are_told_by_its_reasons(tmp_path):
    reasons = {3: "task: other", 5: "flat attention: x: y", 8: "task: other"}
    rows = [answered(n, guard=reasons.get(n)) for n in range(10)]
    told = dict(headline(figures(write(tmp_path / "out.parquet", rows))))
    assert told["dense by the guard"] == "3 (2 task, 1 flat attention)"
    assert "dense by the guard" not in dict(headline(figures(write(tmp_path / "none.parquet", rows[:3]))))


def test_a_pack_counts_its_prefill_once(tmp_path):
    rows = [answered(n, prompt_tokens=500, prefill_ms=1_000.0, pack_documents=4) for n in range(4)]
    found = figures(write(tmp_path / "out.parquet", rows))
    assert found.prefill_rate() == pytest.approx(2_000)
    assert found.packed_share() == 1


def test_layers_have_means_quantiles_and_tiers_of_their_documents(tmp_path):
    rows = [answered(n) for n in range(301)]
    layers = figures(write(tmp_path / "out.parquet", [failed(999), *rows])).layers
    tokens = np.array([row.prompt_tokens for row in rows])[:, None]
    kept, ffn, fp8 = (
        np.array([getattr(row, name) for row in rows]) / tokens
        for name in ("kept_tokens", "ffn_tokens", "ffn_fp8_tokens")
    )
    assert layers.documents == 301
    assert layers.layers == LAYERS
    np.testing.assert_allclose(layers.means(), [kept.mean(0), ffn.mean(0), fp8.mean(0)])
    for share in (0.1, 0.5, 0.9):
        exact = np.quantile(ffn, share, axis=0, method="inverted_cdf")
        np.testing.assert_allclose(layers.quantile(1, share), exact, atol=6e-4)
    tiers = layers.tiers()
    np.testing.assert_allclose(sum(tiers.values()), 1)
    assert tiers["left before"][2] == 0 < tiers["left before"][3]
    assert tiers["FFN skipped"][4] > 0 == tiers["FFN skipped"][5]
    sampled, shares, _ = layers.sampled()
    assert len(sampled) == SAMPLED
    assert (np.diff(sampled) >= 0).all()
    assert {tuple(row) for row in shares} <= {tuple(row) for row in kept.astype(np.float32)}


def test_rows_of_a_method_that_runs_twice_exceed_the_prompt(tmp_path):
    rows = [
        answered(n, prompt_tokens=100, kept_tokens=[130] * 4, ffn_tokens=[120] * 4, ffn_fp8_tokens=None)
        for n in range(3)
    ]
    layers = figures(write(tmp_path / "out.parquet", rows)).layers
    assert layers.quantile(0, 0.5).tolist() == [1.3] * 4
    assert layers.tiers()["left before"].tolist() == [0] * 4
    assert layers.means()[2].tolist() == [0] * 4


def test_several_methods_in_one_output_keep_their_times_apart(tmp_path):
    rows = [answered(n, method="dense" if n % 3 else "mars", ttft_ms=float(n)) for n in range(9)]
    found = figures(write(tmp_path / "out.parquet", rows))
    assert found.times("ttft_ms", "mars").tolist() == [0, 3, 6]
    assert found.times("ttft_ms", "dense").tolist() == [1, 2, 4, 5, 7, 8]


@pytest.mark.parametrize("rows", [[], [failed(0)]])
def test_a_run_without_answers_has_figures_too(tmp_path, rows):
    found = figures(write(tmp_path / "out.parquet", rows))
    assert dict(headline(found))["TTFT p50"] == "-"
    assert found.layers is None
    assert phases(found)[2] == ("prefill", None, None)


def test_configuration_leaves_out_what_has_no_value():
    (first, pairs), (second, deciding) = configuration(METADATA)
    assert (first, second) == ("configuration", "settings that decide an answer")
    assert ("stop", "</s>, <b>stop</b>") in pairs
    assert ("versions.python", "3.12") in pairs
    assert "profile" not in dict(pairs)
    assert deciding == [("method.name", "sliminfer"), ("method.settings.block", "64")]
    assert configuration({}) == []
