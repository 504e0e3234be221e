"""Exit maps: fitted as stock hidden states say, used by a prefill and by runs, refused for others."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import document, loaded, pack_of, tiny_model

from pipeline.calibration.exit_fitting import fit_exit_maps
from pipeline.calibration.rungs import describe, mapped_rungs
from pipeline.errors import ConfigError
from pipeline.families.exit_maps import MapsHeader, check_exit_maps, write_exit_maps
from pipeline.kernels.fused import rope_
from pipeline.model.loading import load_model
from pipeline.model.prefill import prefill
from pipeline.pruning.dense import Dense
from pipeline.pruning.mars import Mars
from pipeline.setup.profile import Profile, load_profile, write_profile

LAST = 0  # of four layers: those behind the next one, 2 and 3, need maps
PROMPTS = [document(150, seed=seed) for seed in range(8)]
HELD_OUT = (PROMPTS[3], PROMPTS[7])


@pytest.fixture(params=["qwen2", "qwen3"])  # with biases, and with norms of keys
def model(request):
    return loaded(tiny_model(request.param))


@torch.inference_mode()
def stock_states(decoder, doc):
    """The residual stream before each layer, (T, D) each, of the stock model."""
    ids = torch.from_numpy(doc.input_ids)[None]
    return [x[0] for x in decoder.model(ids, output_hidden_states=True).hidden_states[:-1]]


def stock_kv(decoder, layer, hidden_TD):
    """(T, N) keys and values before RoPE and their norms, by the modules of the stock model."""
    block = decoder.model.model.layers[layer]
    normed = block.input_layernorm(hidden_TD)
    return torch.cat([block.self_attn.k_proj(normed), block.self_attn.v_proj(normed)], 1)


@torch.inference_mode()
def test_maps_come_as_near_on_prompts_held_out_as_they_say(model):
    decoder = model.decoder
    (fitted,) = fit_exit_maps(model, PROMPTS, [LAST])
    assert sorted(fitted.maps) == [2, 3]
    assert fitted.about.tokens == 8 * 150
    for layer, (weight_ND, bias_N) in fitted.maps.items():
        missed = whole = 0.0
        for doc in HELD_OUT:
            states = stock_states(decoder, doc)
            wanted = stock_kv(decoder, layer, states[layer])
            norm = decoder.model.model.layers[layer].input_layernorm
            made = norm(states[LAST + 1]) @ weight_ND.T + bias_N
            missed += float((wanted - made).square().sum())
            whole += float((wanted - stock_kv(decoder, layer, states[LAST + 1])).square().sum())
        assert missed / whole == pytest.approx(fitted.unexplained[layer], abs=1e-3)
        assert missed < 0.8 * whole


@torch.inference_mode()
def test_a_prefill_makes_keys_and_values_by_the_maps(model, sdpa, tmp_path):
    decoder = model.decoder
    (fitted,) = fit_exit_maps(model, PROMPTS, [LAST])
    path = tmp_path / "maps.safetensors"
    write_exit_maps(path, fitted.about, fitted.maps)
    plain = Mars(last_full=LAST, window=6, most=12)
    mapped = replace(plain, exit_maps=str(path))
    docs = (document(90, seed=20), document(40, seed=21))
    dense, without, made = (
        prefill(decoder, sdpa, method, pack_of(*docs)) for method in (Dense(), plain, mapped)
    )
    for layer in fitted.maps:
        missed = [
            float((each.cache.values[layer] - dense.cache.values[layer]).square().nansum())
            for each in (without, made)
        ]
        assert 0 < missed[1] < missed[0]
    first, left = stock_states(decoder, docs[0])[LAST + 1], 90 - mapped.window_of(90, docs[0].spans)
    (table,) = decoder.rope(first, torch.arange(90)).tables.values()
    for layer, (weight_ND, bias_N) in fitted.maps.items():
        block = decoder.model.model.layers[layer]
        key_TN, value_TN = (block.input_layernorm(first) @ weight_ND.T + bias_N).chunk(2, 1)
        key_TKd = key_TN.unflatten(1, (decoder.shape.kv_heads, -1)).clone()
        if hasattr(block.self_attn, "k_norm"):
            key_TKd = block.self_attn.k_norm(key_TKd)
        rope_(key_TKd[:, :0], key_TKd, *table)
        stored_TKd, values_TKd = made.cache.keys[layer], made.cache.values[layer]
        assert (stored_TKd[:left] - key_TKd[:left]).abs().max() < 1e-4
        assert (values_TKd[:left].flatten(1) - value_TN[:left]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("about", "complaint"),
    [
        ({"fingerprint": "x"}, r"was fitted for another model \(x, and this one is \): calibrate this model"),
        ({"last_full": 1}, "was fitted for last_full=1, and last_full is 0$"),
        (None, "holds no exit maps; calibrate makes such a file beside its profile$"),
    ],
)
def test_maps_of_something_else_are_refused(about, complaint, tmp_path):
    path, model = tmp_path / "maps.safetensors", loaded(tiny_model("qwen2"))
    maps = {} if about is None else {2: (torch.zeros(4, 2), torch.zeros(4))}
    write_exit_maps(
        path, MapsHeader(**{"fingerprint": "", "last_full": 0, "tokens": 1, **(about or {})}), maps
    )
    if about is None:
        path.write_bytes(path.read_bytes().replace(b"marsinfer exit maps", b"something else here"))
    with pytest.raises(ConfigError, match=f"^exit_maps={path} .*{complaint}"):
        check_exit_maps(Mars(last_full=0, exit_maps=str(path)), model.shape, model.fingerprint)


def test_rungs_stop_ever_earlier_and_name_the_file_alone(tmp_path):
    files = {last: tmp_path / f"exit-{last}.safetensors" for last in (0, 1)}
    first, second = mapped_rungs(Mars(sparse_attention=0.9), files, "auto")
    assert describe(first) == "mars sparse_attention=0.9 last_full=1 exit_maps=exit-1.safetensors"
    assert second.method == Mars(sparse_attention=0.9, last_full=0, exit_maps=str(files[0]))


def test_a_profile_brings_its_maps_to_a_run(fish, call, refusal, model_folder, tmp_path, capfd):
    model = load_model(str(model_folder), device="cpu", dtype="float32")
    (fitted,) = fit_exit_maps(model, PROMPTS[:4], [LAST])
    made, path = tmp_path / "made.safetensors", tmp_path / "p.toml"
    write_exit_maps(made, fitted.about, fitted.maps)
    about = {"format": 2, "model": model.name, "fingerprint": model.fingerprint}
    about |= {"device": model.device_name(), "dtype": "float32"}
    settings = {"last_full": LAST, "window": 4, "most": 8, "exit_maps": str(made)}
    write_profile(path, Profile(about=about, batch={"method": "mars", "settings": settings}))
    made.unlink()
    beside = str(tmp_path / "p.exit-maps.safetensors")
    assert load_profile(str(path)).batch["settings"]["exit_maps"] == beside
    out = tmp_path / "out.jsonl"
    asked = ("--text-column", "body", "--question-column", "ask", "--max-new-tokens", "2", "--quiet")
    flags = (*asked, "--method", "mars", "--profile", path)
    assert call(fish, out, *flags) == 0
    rows = [json.loads(line) for line in out.open()]
    assert all(isinstance(row["answer"], str) for row in rows)
    assert max(row["ffn_ratio"] for row in rows) < 1
    write_exit_maps(
        tmp_path / "p.exit-maps.safetensors",
        fitted.about,
        {k: (w + 1, b) for k, (w, b) in fitted.maps.items()},
    )
    assert "exit_maps" in refusal(fish, out, "--resume", *flags)
    named = ("--method", "mars", "--set", f"exit_maps={tmp_path / 'none'}", "--set", "last_full=0")
    assert refusal(fish, tmp_path / "o.jsonl", *asked, *named).endswith(
        "; calibrate makes such a file beside its profile"
    )
