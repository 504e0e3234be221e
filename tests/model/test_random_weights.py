"""Models of random weights, by name: the same in every process, and read by a tokenizer of bytes."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch

from marsinfer_cli.app import run
from pipeline.checkpoints.random_weights import SHAPES, byte_tokenizer
from pipeline.errors import ModelError
from pipeline.model.loading import load_model, open_model
from pipeline.pruning.operations import layer_weights
from pipeline.settings.model_settings import ModelSettings


def test_two_processes_would_draw_the_same_weights():
    first, second = (load_model("random:tiny", device="cpu", dtype="bfloat16") for _ in range(2))
    assert first.dtype == torch.bfloat16
    pairs = zip(first.decoder.model.named_parameters(), second.decoder.model.named_parameters(), strict=True)
    drawn = 0
    for (name, weight), (_, other) in pairs:
        assert torch.equal(weight, other), name
        drawn += weight.dim() > 1 and weight.float().std() > 0.01
    assert drawn == 7 * 28 + 2  # all matrices, those of the vocabulary included
    assert (first.name, first.fingerprint) == ("random:tiny", second.fingerprint)


def test_a_large_shape_is_told_without_its_weights():
    model = open_model(ModelSettings(model="random:qwen2-7b", device="cpu"))
    assert (model.shape.layers, model.shape.hidden, model.shape.vocab) == (28, 3584, 152064)
    assert model.dtype == torch.float32
    longer = open_model(ModelSettings(model="random:qwen2-7b", device="cpu", rope_scaling="yarn:2"))
    assert longer.shape.context == 2 * model.shape.context
    fingerprints = {
        open_model(ModelSettings(model=f"random:{shape}", device="cpu")).fingerprint for shape in SHAPES
    }
    assert len(fingerprints) == len(SHAPES)
    assert longer.fingerprint in fingerprints


def test_an_unknown_shape_is_refused_with_those_there_are():
    with pytest.raises(ModelError) as caught:
        open_model(ModelSettings(model="random:qwen2-70b", device="cpu"))
    assert str(caught.value) == (
        f"model 'random:qwen2-70b': there is no such shape; shapes: {', '.join(SHAPES)}"
    )


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        ("qwen2-7b", 7.62),
        ("llama-3.1-8b", 8.03),
        ("llama-3.1-70b", 70.55),
        ("qwen1.5-32b", 32.51),
        ("qwen3-8b", 8.19),
        ("mistral-7b", 7.24),
        ("gemma3-12b", 11.77),  # without what sees images
        ("qwen3-30b-a3b", 30.53),
        ("gpt-oss-20b", 20.91),  # in bfloat16, as the other shapes: published are experts in MXFP4
    ],
)
def test_shapes_have_as_many_weights_as_their_models(shape, billions):
    model = open_model(ModelSettings(model=f"random:{shape}", device="cpu"))
    sizes, matrices = model.shape, 1 if model.config.tie_word_embeddings else 2
    count = layer_weights(sizes, rows=sizes.experts) + matrices * sizes.vocab * sizes.hidden
    assert count / 1e9 == pytest.approx(billions, abs=0.02)  # norms and biases are left out


def test_shapes_with_windows_and_experts():
    mistral, gemma, moe, oss = (
        open_model(ModelSettings(model=f"random:{name}", device="cpu")).shape
        for name in ("mistral-7b", "gemma3-12b", "qwen3-30b-a3b", "gpt-oss-20b")
    )
    assert (mistral.context, set(mistral.windows)) == (32768, {4096})
    assert gemma.windows == ((1024,) * 5 + (None,)) * 8
    assert (moe.experts, moe.experts_per_token, moe.ffn, moe.ffn_per_token) == (128, 8, 768, 6144)
    assert (oss.experts, oss.experts_per_token, oss.ffn, oss.ffn_per_token) == (32, 4, 2880, 11520)
    assert (oss.windows, oss.has_sinks, oss.head_dim) == ((128, None) * 12, True, 64)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_token_of_a_text_lies_beyond_the_vocabulary(shape):
    tokenizer, vocab = byte_tokenizer(), SHAPES[shape][1]["vocab_size"]
    assert max(tokenizer.get_vocab().values()) < vocab
    text = "Ünï <code>\n\n𝄞"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode([*ids, vocab - 1, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_a_batch_is_answered(tmp_path, capfd):
    source, texts = tmp_path / "in.jsonl", ["a text of bytes " * n for n in (3, 20, 41)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = ["--model", "random:tiny", "--device", "cpu", "--question", "what?", "--max-new-tokens", "5"]
    flags += ["--method", "sliminfer", "--set", "budget=0.4,0.2,0.1", "--set", "block=16"]
    tables = []
    for name in ("first", "second"):
        output = tmp_path / f"{name}.parquet"
        assert run(["batch", str(source), str(output), *flags, "--quiet"]) == 0
        tables.append(pq.read_table(output))
    first, second = tables
    assert first.column("status").to_pylist() == ["ok"] * 3
    assert first.column("document_tokens").to_pylist() == [len(text) for text in texts]
    assert all(ratio < 1 for ratio in first.column("flops_ratio").to_pylist())
    assert first.column("answer").equals(second.column("answer"))
    told = json.loads(first.schema.metadata[b"marsinfer"])
    assert told["settings_that_decide"]["model"]["fingerprint"].startswith("random:")
    assert run(["batch", str(source), str(tmp_path / "third.parquet"), *flags, "--dry-run"]) == 0
    assert not (tmp_path / "third.parquet").exists()
    capfd.readouterr()


@pytest.mark.slow
def test_bench_takes_the_shape_by_either_flag(capfd):
    flags = ["--lengths", "40", "--methods", "dense", "--baselines", "none", "--repeats", "1", "--json"]
    for words in (["--random-weights", "tiny"], ["--model", "random:tiny"]):
        assert run(["bench", "ttft", *words, *flags, "--device", "cpu"]) == 0
        assert json.loads(capfd.readouterr().out)["model"] == "random:tiny"
