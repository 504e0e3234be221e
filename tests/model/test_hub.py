"""Models by their names on the hub, which here is a server of this machine, through the command itself."""

from __future__ import annotations

import json
import os
import signal
import time

import pyarrow.parquet as pq
import pytest
import torch
from checkpoints import change_config, copied, shard
from conftest import SIZES
from hub_commands import Commands
from hub_server import TOKEN, Hub, files_of

from pipeline.checkpoints.building import random_model

pytestmark = pytest.mark.slow

NEEDED = [
    *("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json"),
]
SMALL = [name for name in NEEDED if name != "model.safetensors"]
OTHERS = [
    *("README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "model.onnx"),
    *("training_args.bin", "trainer_state.json", "model.gguf", "modeling_own.py", "adapter_config.json"),
    *("onnx/model.onnx", "original/consolidated.00.pth", "fp16/model.safetensors", "logo.png"),
]


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    yield server
    server.close()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return {
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_HUB_CACHE": str(tmp_path_factory.mktemp("hub")),
    }


@pytest.fixture(scope="module")
def started():
    """Starts processes for commands, and ends them."""
    all_of_them = []

    def start(**settings):
        all_of_them.append(Commands(**settings))
        return all_of_them[-1]

    yield start
    for each in all_of_them:
        each.close()


@pytest.fixture(scope="module")
def online(hub, places, started):
    return started(HF_ENDPOINT=hub.url, **places)


@pytest.fixture(scope="module")
def offline(hub, places, started):
    return started(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1", **places)


@pytest.fixture(scope="module")
def cut_off(places, started):
    """A process whose hub does not answer."""
    server = Hub()
    server.close()
    return started(HF_ENDPOINT=server.url, **places)


@pytest.fixture
def files(model_folder):
    return files_of(model_folder)


@pytest.fixture
def words(tmp_path):
    """Those of `marsinfer batch` with a model of a name."""
    (tmp_path / "in.jsonl").write_text('{"id": "1", "text": "one fish"}\n{"id": "2", "text": "two fish"}\n')

    def words(name, *flags):
        places = (tmp_path / "in.jsonl", tmp_path / "out.parquet", "--model", name, "--id-column", "id")
        asked = ("--question", "what?", "--method", "dense", "--max-new-tokens", 2)
        return ["batch", *places, *asked, *flags]

    return words


@pytest.fixture
def batch(words):
    """`marsinfer batch` in one of these environments."""

    def call(commands, name, *flags, **changes):
        return commands.run(*words(name, *flags), **changes)

    return call


@pytest.fixture
def answers(batch, tmp_path):
    """How a run goes that answers all rows, and the model's fingerprint that its output names."""

    def call(process, name, *flags, **environment):
        outcome = batch(process, name, "--overwrite", *flags, **environment)
        assert outcome.code == 0, outcome.err
        table = pq.read_table(tmp_path / "out.parquet")
        assert table["status"].to_pylist() == ["ok", "ok"]
        return fingerprint(tmp_path), outcome.err

    return call


def fingerprint(folder):
    about = json.loads(pq.read_schema(folder / "out.parquet").metadata[b"marsinfer"])
    return about["settings_that_decide"]["model"]["fingerprint"]


def test_only_what_is_needed_is_downloaded(hub, online, answers, batch, files):
    all_files = {**files, **dict.fromkeys(OTHERS, b"{}")}
    commit = hub.add("org/tiny", all_files).branches["main"]
    assert batch(online, "org/tiny", "--dry-run").code == 0
    assert hub.downloaded("org/tiny") == SMALL
    assert answers(online, "org/tiny")[0] == f"commit:{commit}"
    assert hub.downloaded("org/tiny") == NEEDED
    assert any(each.path.startswith("/stored/org/tiny/") for each in hub.asked)  # by a redirect


def test_shards_are_those_of_the_index(hub, online, answers, model_folder, tmp_path):
    folder = copied(model_folder, tmp_path / "sharded")
    names = sorted(set(shard(folder).values()))
    hub.add("org/sharded", {**files_of(folder), "other-00001-of-00001.safetensors": b"{}"})
    answers(online, "org/sharded")
    assert hub.downloaded("org/sharded") == sorted([*SMALL, *names, "model.safetensors.index.json"])


def test_an_index_beside_all_in_one_file_is_not_needed(hub, online, answers, files):
    hub.add("org/both", {**files, "model.safetensors.index.json": b"{}"})
    answers(online, "org/both")
    assert hub.downloaded("org/both") == NEEDED


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, online, answers, batch, files):
    repository = hub.add("org/revised", files)
    old = repository.branches["main"]
    repository.branches["v1"] = old
    new = repository.push({**files, "README.md": b"new"})
    assert answers(online, "org/revised")[0] == f"commit:{new}"
    for revision in ("v1", old):
        assert answers(online, "org/revised", "--revision", revision)[0] == f"commit:{old}"
    asked = len(hub.asked)
    answers(online, "org/revised", "--revision", old)
    assert len(hub.asked) == asked  # a commit that is in the cache cannot change
    assert batch(online, "org/revised", "--revision", "v2", "--overwrite").error == (
        "model 'org/revised' cannot be had: the hub has no revision 'v2' of it; it is not in the cache, "
        f"{hub_cache(online)}"
    )


def hub_cache(process):
    return process.environment["HF_HUB_CACHE"]


def test_all_files_are_of_one_commit(hub, online, answers, files):
    repository = hub.add("org/moving", files, moves={**files, "config.json": b"{}"})
    first = repository.branches["main"]
    assert answers(online, "org/moving")[0] == f"commit:{first}"
    assert repository.branches["main"] != first
    asked = [each.path.split("/")[4] for each in hub.asked if each.path.startswith("/org/moving/resolve/")]
    assert set(asked) == {first}


def test_a_run_does_not_go_on_with_a_branch_that_moved(hub, online, answers, batch, files, tmp_path):
    repository = hub.add("org/moved", files)
    old = repository.branches["main"]
    answers(online, "org/moved")
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write('{"id": "3", "text": "three fish"}\n')
    new = repository.push({**files, "README.md": b"new"})
    said = (
        f"{tmp_path / 'out.parquet'} was begun with commit {old} of org/moved, whose revision main is "
        f"{new[:12]} now: --revision {old} goes on with it, --overwrite starts over"
    )
    assert batch(online, "org/moved", "--resume").error == said
    assert batch(online, "org/moved", "--resume", "--dry-run").error == said
    assert batch(online, "org/moved", "--resume", "--revision", old).code == 0
    assert (pq.read_table(tmp_path / "out.parquet").num_rows, fingerprint(tmp_path)) == (3, f"commit:{old}")


@pytest.fixture(scope="module")
def large_files(model_folder, tmp_path_factory):
    """A model whose weights are more than the library reads at once."""
    folder = copied(model_folder, tmp_path_factory.mktemp("large") / "m")
    sizes = {**SIZES, "vocab_size": 320, "intermediate_size": 8192}
    random_model("qwen2", sizes, device=torch.device("cpu"), dtype=torch.float32).save_pretrained(folder)
    return files_of(folder)


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, online, answers, large_files):
    hub.add("org/cut", large_files, cuts=1)
    answers(online, "org/cut")
    first, again = (each.range for each in hub.asked if each.path.startswith("/stored/org/cut/"))
    assert first is None
    start = int(again.removeprefix("bytes=").removesuffix("-"))
    assert 1 << 20 < start < len(large_files["model.safetensors"])


def test_a_connection_that_is_reset_is_made_anew(hub, online, answers, files):
    hub.add("org/reset", files, resets=2)
    answers(online, "org/reset")
    assert len([each for each in hub.asked if each.path.startswith("/stored/org/reset/")]) == 3


def test_an_interrupt_ends_a_download(hub, online, words, files):
    hub.add("org/stalled", files, stalls=True)
    process = online.start(*words("org/stalled"))
    while not any(each.path.startswith("/stored/org/stalled/") for each in hub.asked):
        os.kill(process, 0)  # it is there
        time.sleep(0.02)
    os.kill(process, signal.SIGINT)
    outcome = online.outcome()
    assert (outcome.code, len(hub.downloaded("org/stalled"))) == (130, len(NEEDED)), outcome.err


@pytest.mark.parametrize("states", [[429], [503], [500, 502]], ids=str)
def test_a_busy_hub_is_asked_again(hub, online, answers, files, states):
    name = f"org/busy-{states[0]}"
    repository = hub.add(name, files, states=list(states))
    answers(online, name)
    assert repository.states == []


@pytest.mark.parametrize(
    ("token", "remedy"),
    [(None, "and set HF_TOKEN to a token of yours"), ("hf_other", "with the account of your token")],
)
def test_a_gated_model_says_what_to_do(hub, online, batch, files, token, remedy):
    name = f"org/gated-{token}"
    hub.add(name, files, is_gated=True)
    assert batch(online, name, HF_TOKEN=token).error == (
        f"model {name!r} cannot be downloaded: it is gated: accept its licence at {hub.url}/{name}, {remedy}"
    )


def test_a_token_opens_a_gated_model(hub, online, answers, files):
    hub.add("org/licensed", files, is_gated=True)
    answers(online, "org/licensed", HF_TOKEN=TOKEN)
    assert {each.token for each in hub.asked if each.path.startswith("/stored/org/licensed/")} == {None}
    answers(online, "org/licensed")  # from the cache, which has it


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_a_name_that_nobody_has(online, batch, token):
    private = "HF_TOKEN is not set" if token is None else "your token may not read it"
    assert batch(online, "org/none", HF_TOKEN=token).error == (
        f"model 'org/none' cannot be had: the hub has no model of this name, or it is private and {private}; "
        f"it is not in the cache, {hub_cache(online)}"
    )


def test_a_name_that_cannot_be(online, batch):
    assert batch(online, "o--rg/a b").error.startswith("'o--rg/a b' is no hub id (owner/name): ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model.safetensors": None, "pytorch_model.bin": b""},
            "model 'NAME' has only pickled weights, which can run code on the hub: name one with safetensors",
        ),
        ({"model.safetensors": None}, "model 'NAME' has no weights on the hub: name one with safetensors"),
        (
            {"config.json": None, "model.gguf": b""},
            "model 'NAME' has no config.json on the hub (GGUF files are read from a local path)",
        ),
        (
            {"model.safetensors": None, "adapter_model.safetensors": b"", "adapter_config.json": b"{}"},
            "model folder NAME is a LoRA adapter of another model: give that model as --model, and this "
            "folder as --adapter",
        ),
        ({"tokenizer.json": b"{}"}, "model 'NAME' cannot be loaded: "),
        ({"config.json": b"{"}, "is no JSON"),
        ({"config.json": b'{"model_type": "none"}'}, "model 'NAME' cannot be loaded: "),
        ({"config.json": b'{"auto_map": {}}'}, "brings its own code, which would run here"),
    ],
    ids=["pickled", "no weights", "gguf", "adapter", "tokenizer", "damaged", "unknown", "code"],
)
def test_what_is_no_model_is_told_before_weights_are_downloaded(
    hub, online, batch, files, changes, said, request
):
    name = f"org/no-{request.node.callspec.id.replace(' ', '-')}"
    changed = {key: value for key, value in {**files, **changes}.items() if value is not None}
    hub.add(name, changed)
    assert said.replace("NAME", name) in batch(online, name).error
    assert "model.safetensors" not in hub.downloaded(name)


def test_weights_are_held_against_the_configuration_once_they_are_there(
    hub, online, batch, model_folder, tmp_path
):
    folder = copied(model_folder, tmp_path / "wide")
    change_config(folder, intermediate_size=128)
    hub.add("org/wide", files_of(folder))
    last = batch(online, "org/wide").err.splitlines()[-1]
    assert last.startswith(
        "marsinfer: error: model org/wide has 12 tensors of other shapes than a qwen2 model"
    )


def test_without_a_network_the_cache_serves(hub, online, offline, cut_off, answers, batch, files):
    commit = hub.add("org/kept", files).branches["main"]
    assert "cache" not in answers(online, "org/kept")[1]
    asked = len(hub.asked)
    told = f"note: org/kept is taken from the cache, at commit {commit[:12]}, as "
    found, printed = answers(offline, "org/kept")
    assert found == f"commit:{commit}"
    assert f"{told}HF_HUB_OFFLINE is set\n" in printed
    assert len(hub.asked) == asked
    found, printed = answers(cut_off, "org/kept")
    assert found == f"commit:{commit}"
    assert f"{told}the hub ({cut_off.environment['HF_ENDPOINT']}) cannot be reached: " in printed


def test_without_a_network_and_not_in_the_cache(hub, online, offline, cut_off, batch, files):
    place = hub_cache(online)
    assert batch(offline, "org/away").error == (
        f"model 'org/away' cannot be had: HF_HUB_OFFLINE is set; it is not in the cache, {place}"
    )
    error = batch(cut_off, "org/away").error
    assert error.startswith("model 'org/away' cannot be had: the hub (http://127.0.0.1:")
    assert "cannot be reached: " in error
    assert error.endswith(f"; it is not in the cache, {place}")
    commit = hub.add("org/begun", files).branches["main"]
    assert batch(online, "org/begun", "--dry-run").code == 0
    offline_now = "model 'org/begun' cannot be had: HF_HUB_OFFLINE is set; "
    assert batch(offline, "org/begun").error == f"{offline_now}it is not in the cache, {place}"
    lacks = f"{offline_now}the cache, {place}, lacks its model.safetensors"
    assert batch(offline, "org/begun", "--revision", commit).error == lacks


def test_a_new_commit_that_was_only_looked_at_takes_no_cached_one_away(
    hub, online, offline, answers, batch, files
):
    repository = hub.add("org/ahead", files)
    old = repository.branches["main"]
    answers(online, "org/ahead")
    repository.push({**files, "config.json": files["config.json"] + b" ", "model.safetensors": b"unlike"})
    assert batch(online, "org/ahead", "--overwrite", "--dry-run").code == 0
    assert answers(offline, "org/ahead")[0] == f"commit:{old}"


def test_a_model_of_a_new_name_is_found_by_the_old_one(hub, online, answers, files):
    commit = hub.add("org/new-name", files).branches["main"]
    hub.renamed["org/old-name"] = "org/new-name"
    assert answers(online, "org/old-name")[0] == f"commit:{commit}"


def test_a_disk_that_is_full(hub, places, online, batch, files):
    hub.add("org/large", files)
    size = len(files["model.safetensors"])
    outcome = batch(online, "org/large", largest_file=size - 1)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == (
        f"marsinfer: error: model 'org/large' cannot be downloaded: no room in {places['HF_HUB_CACHE']} "
        "(file too large); free some, or set HF_HUB_CACHE to a folder on another disk"
    )
