"""The embedded model: the equalities of tiny models on trained weights, and a check's verdicts.

The longer document is cut to about 1,000 tokens, in which the methods prune as they do in longer ones; linear
layers take them in several pieces, as they would 16,384 and more. What 4,000 tokens would add are larger
positions, whose rotation is that of transformers. Tests of these weights are all here: they load slowly.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import pack_of

from pipeline.checks.checking import run_check
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.model.loading import open_model
from pipeline.model.prefill import prefill
from pipeline.prompts.builder import PromptBuilder
from pipeline.prompts.tokenizing import stop_token_ids
from pipeline.pruning.dense import Dense
from pipeline.pruning.marsinfer import MarsInfer
from pipeline.records import Document, Row
from pipeline.settings.check_settings import CheckConfig
from pipeline.settings.model_settings import ModelSettings

pytestmark = pytest.mark.slow

LICENSES = Path(__file__).parents[2] / "examples" / "licenses.jsonl"
NEW_TOKENS = 6
PIECE_TOKENS = 300
BROKEN = {"eta": 0.3, "start_layer": 0, "prefix": 0, "window": 1}


@pytest.fixture(scope="module")
def smollm2_file():
    return open_model(ModelSettings(model="smollm2-135m", device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def smollm2(smollm2_file):
    model = smollm2_file.load()
    model.decoder.piece_tokens = PIECE_TOKENS
    return model


@pytest.fixture(scope="module")
def documents(smollm2):
    rows = {row["id"]: row for row in map(json.loads, LICENSES.open(encoding="utf-8"))}
    prompts = PromptBuilder(smollm2.tokenizer, context=8192, max_new_tokens=NEW_TOKENS)
    chosen = [
        {**rows["gpl-2-program"], "text": rows["gpl-2-program"]["text"][:4500]},
        {**rows["apache-2.0-date"], "text": rows["apache-2.0-date"]["text"][:1000]},
    ]
    return [
        prompts.encode(
            Document(
                source=Row(row=n, id=row["id"], place=row["id"], question=row["question"]), text=row["text"]
            )
        )
        for n, row in enumerate(chosen)
    ]


@pytest.fixture(scope="module")
def dense(smollm2, documents):
    """The pack of both documents, prefilled."""
    return prefill(smollm2.decoder, smollm2.attention, Dense(), pack_of(*documents), NEW_TOKENS)


def test_the_file_says_what_the_loaded_model_does(smollm2_file, smollm2):
    for name in ("name", "shape", "fingerprint", "dtype", "device", "attention_refused"):
        assert getattr(smollm2_file, name) == getattr(smollm2, name)


def test_dense_gives_the_logits_and_the_answer_of_transformers(smollm2, documents, dense):
    model = smollm2.decoder.model
    assert documents[0].prompt_tokens > 3 * PIECE_TOKENS
    rules = StopRules(
        max_new_tokens=NEW_TOKENS, token_ids=stop_token_ids(smollm2.tokenizer, smollm2.generation_config)
    )
    answers = decode(smollm2.decoder, smollm2.attention, dense, rules)
    for b, document in enumerate(documents):
        ids = torch.from_numpy(document.input_ids)[None]
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        # relative to logits of about 20: the pack's matrix shapes alone differ by 1e-5
        assert (dense.logits_BV[b] - output.logits[0][0]).abs().max() <= 1e-4
        assert dense.logits_BV[b].argmax() == output.logits[0][0].argmax()
        stock = [t for t in output.sequences[0, ids.shape[1] :].tolist() if t not in rules.token_ids]
        assert answers[b].tokens == stock


def test_full_eta_equals_dense_through_the_real_gather(smollm2, documents, dense):
    for b, document in enumerate(documents):
        full = prefill(smollm2.decoder, smollm2.attention, MarsInfer(eta=1.0), pack_of(document))
        assert (full.logits_BV[0] - dense.logits_BV[b]).abs().max() <= 1e-4
        assert full.logits_BV[0].argmax() == dense.logits_BV[b].argmax()


def test_the_papers_settings_prune_from_their_first_layer_on(smollm2, documents):
    pruned = prefill(smollm2.decoder, smollm2.attention, MarsInfer(eta=0.9), pack_of(documents[1]))
    shares = [layer[0] / documents[1].prompt_tokens for layer in pruned.work.ffn()]
    assert shares[:10] == [1.0] * 10
    assert 0.1 < sum(shares[10:]) / 20 < 0.9


def test_a_check_tells_a_broken_setting_from_one_that_prunes_nothing(smollm2, tmp_path):
    rows = [json.loads(line) for line in LICENSES.open(encoding="utf-8")]
    of_each_text = {row["text"]: {**row, "text": row["text"][:400]} for row in rows}
    path = tmp_path / "licenses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in of_each_text.values()))
    config = CheckConfig(
        input=(str(path),),
        question_column="question",
        id_column="id",
        reference_column="reference",
        method="marsinfer",
        settings=BROKEN,
        scope="rows",
        max_drop="5pt",
        metric="agreement",
        baseline=str(tmp_path / "dense.parquet"),
    )
    broken = run_check(config, model=smollm2)
    assert (broken.verdict, broken.gates[0].drop.documents) == ("fail", 5)
    measures = {measure.name: measure for measure in broken.gates[0].measures}
    assert measures["nll"].method > measures["nll"].dense + 0.5
    assert measures["KL from dense"].method > 0.5
    full = run_check(replace(config, settings={"eta": 1.0}, max_drop="0pt"), model=smollm2)
    assert (full.verdict, full.gates[0].drop.drop) == ("inconclusive", 0)
    assert "nothing was pruned" in full.gates[0].judgement.reason
    measures = {measure.name: measure for measure in full.gates[0].measures}
    assert measures["token-accuracy"].method == measures["token-accuracy"].dense > 0
    assert abs(measures["KL from dense"].method) < 1e-4
