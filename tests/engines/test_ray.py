"""Workers of Ray: the rows of the local engine, whatever becomes of the workers meanwhile."""

from __future__ import annotations

import json
import pickle
import random
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marsinfer_cli.app import run
from pipeline.errors import ConfigError, ModelError
from pipeline.model.loading import open_model
from pipeline.pruning.dense import Dense
from pipeline.run import open_input
from pipeline.settings.model_settings import ModelSettings
from pipeline.settings.run_settings import BatchConfig
from pipeline.setup.preparation import prepare
from pipeline.setup.profile import Profile, write_profile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed"),
]

LETHAL = f"{Path(__file__).with_name('lethal_method.py')}:Lethal"
# of when, and beside what, a row was answered
PASSING = dict.fromkeys(("queue_ms", "tokenize_ms", "prefill_ms", "ttft_ms", "decode_ms", "shared_ms"))
PASSING |= {"pack_documents": None, "pack_tokens": None}
COLUMNS = ("--id-column", "doc", "--text-column", "body", "--question-column", "ask", "--quiet")
FLAGS = (*COLUMNS, "--max-new-tokens", "4", "--pack-tokens", "2k")
RAY = ("--engine", "ray", "--workers", "2", "--gpus-per-worker", "0")
GONE = "its process or its machine is gone"


def texts(rows=90):
    """Rows of many lengths, of which some ask about one document, two are too long and one is empty."""
    for n in range(rows):
        seed = n - n % 3 if n % 7 < 3 else n
        words = random.Random(seed)
        length = 2500 if n in (20, 61) else 0 if n == 33 else words.randrange(20, 700)
        body = "".join(words.choices("abcdefgh .", k=length))
        yield {
            "doc": f"d{n}",
            "body": body,
            "ask": f"what?{'!' * (n % 5)}",
            "kind": "ab"[n % 4 == 0],
            "year": n,
        }
    yield {"doc": "d3", "body": "the same id again", "ask": "what?", "kind": "a", "year": 3}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "in.parquet"
    pq.write_table(pa.Table.from_pylist(list(texts())), path, row_group_size=20)
    return path


@pytest.fixture(scope="module")
def expected(source, sharp_model_folder, tmp_path_factory):
    """The rows of the local engine, where nothing dies."""
    out = tmp_path_factory.mktemp("local") / "out.parquet"
    model = ("--model", str(sharp_model_folder), "--method", LETHAL)
    assert run(["batch", str(source), str(out), *FLAGS, *model]) == 0
    return rows_of(out)


@pytest.fixture(scope="module")
def cluster():
    """Two machines of one CPU each as Ray sees it, the first with a GPU; the second's environment says so."""
    from ray.cluster_utils import Cluster

    noticed = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False, "_system_config": noticed},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NODE_OF_TEST", "second")
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def orders(tmp_path):
    return tmp_path / "orders.json"


@pytest.fixture
def batch(call, source, sharp_model_folder, tmp_path, monkeypatch, orders, capfd):
    """A run with more flags, by its exit code, its rows and what it said."""
    monkeypatch.setenv("MARSINFER_MODEL", str(sharp_model_folder))
    monkeypatch.delenv("MARSINFER_METHOD")

    def batch(name, *flags):
        out = tmp_path / f"{name}.parquet"
        if "--profile" not in flags:
            flags = ("--method", LETHAL, "--set", f"orders={orders}", *flags)
        code = call(source, out, *FLAGS, *flags)
        return code, rows_of(out) if out.exists() else [], capfd.readouterr()

    return batch


def rows_of(path):
    return [lasting(row) for row in pq.read_table(path).to_pylist()]


def lasting(row):
    """What does not change from run to run."""
    parts = row["parts"] and [part | dict.fromkeys(part.keys() & PASSING.keys()) for part in row["parts"]]
    return row | PASSING | {"parts": parts}


def statuses(rows):
    return {row["id"]: row["error_type"] for row in rows if row["status"] != "ok"}


def test_what_a_worker_raised_at_its_start_is_said():
    from ray.exceptions import ActorDiedError, RayTaskError

    from pipeline.engines.ray import _cause

    what = "ModuleNotFoundError: No module named 'pipeline'"
    raised = RayTaskError("Worker", f"Traceback:\n  File x\n{what}\n", ModuleNotFoundError("pipeline"))
    assert _cause(ActorDiedError.from_task_error(raised)) == f"its start raised {what}"
    assert _cause(ActorDiedError()) == "its process or its machine is gone"


def test_a_machine_with_another_model_is_refused(source, sharp_model_folder):
    from pipeline.engines.ray_worker import Worker

    run = prepared(source, str(sharp_model_folder), device="cpu")
    with pytest.raises(ModelError, match=r"^on [\d.]+: .* is not the model of this run \(files:else\)"):
        Worker(gpus=0, workers=1).start(run, "files:else")


def test_a_model_for_a_gpu_that_another_machine_has(source, sharp_model_folder):
    from pipeline.engines.ray_cluster import distant_model
    from pipeline.engines.ray_worker import ModelFacts

    facts = {"dtype": "bfloat16", "device_name": "NVIDIA H100", "attention_name": "fa3"}
    config = config_of(source, str(sharp_model_folder), linear_dtype="fp8")
    model = distant_model(config, ModelFacts(**facts, attention_refused={}, fp8_refused="no fp8 there"))
    with pytest.raises(ConfigError, match="no fp8 there"):
        prepare(open_input(config), model, Dense())
    model = distant_model(config, ModelFacts(**facts, attention_refused={}, fp8_refused=None))
    run = prepare(open_input(config), model, Dense())
    assert run.decides()["model"]["dtype"] == "torch.bfloat16"
    told = json.loads(run.schema().metadata[b"marsinfer"])
    assert (told["device"], told["attention"]["backend"]) == ("NVIDIA H100", "fa3")
    assert pickle.loads(pickle.dumps(model)).fingerprint == model.fingerprint


def config_of(source, model, **options):
    options |= {"text_column": "body", "question_column": "ask"}
    return BatchConfig(input=(str(source),), output="out.parquet", model=model, method="dense", **options)


def prepared(source, model, **options):
    config = config_of(source, model, **options)
    return prepare(open_input(config), model, Dense())


def test_two_workers_give_the_rows_of_one_process(batch, sharp_model_folder, tmp_path):
    model = open_model(ModelSettings(model=str(sharp_model_folder), device="cpu"))
    about = {"format": 1, "model": model.name, "fingerprint": model.fingerprint, "device": "CPU"}
    about |= {"dtype": "float32", "lengths": {"max": 10_000}}
    about |= {"guard": {"tasks": ["a"], "shares": {"ffn_ratio": {"1000": 0.4}}}}
    profile = tmp_path / "profile.toml"
    settings = {"eta": 0.5, "start_layer": 1, "prefix": 0, "window": 4}
    write_profile(profile, Profile(about=about, batch={"method": "marsinfer", "settings": settings}))
    flags = ("--profile", profile, "--task-column", "kind", "--on-overlong", "split", "--split-overlap", "16")
    _, expected, _ = batch("local", *flags)
    code, rows, said = batch("ray", *flags, "--engine", "ray", "--workers", "2", "--json")
    assert code == 0
    assert rows == expected
    assert statuses(rows) == {"d33": "empty_document", "d3": "duplicate_id"}
    assert {row["method"] for row in rows if row["guard"] and not row["parts"]} == {"dense"}
    assert sum(row["group_rows"] is not None for row in rows) > 10
    assert [len(row["parts"]) for row in rows if row["parts"]] != []
    summary = json.loads(said.out)  # and nothing else
    assert (summary["documents"], summary["grouped_rows"] > 0) == (91, True)
    guarded = [row["guard"].partition(":")[0] for row in rows if row["guard"]]
    assert (summary["guarded_by_task"], summary["guarded_by_attention"]) == (
        guarded.count("task"),
        guarded.count("flat attention"),
    )
    assert min(guarded.count("task"), guarded.count("flat attention")) > 0
    assert 0 < summary["second_prefill_s"] < summary["prefill_s"]
    assert 0 < summary["answering_s"] < summary["seconds"]
    assert "Ray starts 2 workers on this machine, 0 GPUs each" in said.err
    assert all(line.startswith("marsinfer: ") for line in said.err.splitlines()), said.err


def test_a_killed_worker_loses_and_doubles_nothing(batch, cluster, orders, expected):
    orders.write_text(json.dumps({"pack": 5}))
    code, rows, said = batch("ray", *RAY, "--ray-address", cluster.address)
    assert not orders.exists()
    assert code == 0
    assert rows == expected
    assert GONE in said.err
    assert "worker_died" not in statuses(rows).values()


def test_a_row_that_kills_its_worker_twice_is_an_error_row(batch, cluster, orders, expected):
    lengths = [row["prompt_tokens"] for row in expected if row["status"] == "ok" and not row["group_rows"]]
    deadly = next(n for n in sorted(lengths) if n > 200 and lengths.count(n) == 1)
    orders.write_text(json.dumps({"tokens": deadly}))
    code, rows, said = batch("ray", *RAY, "--ray-address", cluster.address, "--max-errors", "5")
    assert code == 0
    (number,) = [n for n, row in enumerate(rows) if row["error_type"] == "worker_died"]
    assert rows[number]["prompt_tokens"] == deadly
    assert rows[number]["year"] == number
    assert f"row {number}: two workers died while they answered it" in rows[number]["error_message"]
    assert [row for n, row in enumerate(rows) if n != number] == [
        row for n, row in enumerate(expected) if n != number
    ]
    assert said.err.count(GONE) == 2
    orders.unlink()
    code, rows, _ = batch("ray", "--resume", "--retry-errors")  # by the local engine
    assert code == 0
    assert rows == expected


def test_a_stopped_run_goes_on_with_another_engine(batch, cluster, expected):
    one = ("--engine", "ray", "--workers", "1", "--gpus-per-worker", "0", "--ray-address", cluster.address)
    code, rows, said = batch("out", *one, "--max-errors", "3")
    assert code == 4
    assert rows == []
    assert "more than --max-errors 3 allows" in said.err
    code, rows, said = batch("out", "--resume")
    assert code == 0
    assert rows == expected


def test_the_model_of_a_worker_may_be_divided(call, fish, tmp_path, cluster):
    worker = ("--engine", "ray", "--workers", "1", "--gpus-per-worker", "0", "--ray-address", cluster.address)
    divided = (*worker, "--tensor-parallel", "2")
    answers = []
    for name, flags in (("here", ()), ("divided", divided)):
        output = tmp_path / f"{name}.parquet"
        assert call(fish, output, *COLUMNS, "--max-new-tokens", "4", *flags) == 0
        answers.append(pq.read_table(output, columns=["id", "status", "answer"]).to_pylist())
    assert answers[0] == answers[1]


def test_what_a_gpus_worker_refuses_is_said(call, source, tmp_path, cluster, capfd):
    flags = ("--engine", "ray", "--ray-address", cluster.address)  # where one GPU is said to be
    assert call(source, tmp_path / "out.parquet", *FLAGS, *flags) == 2
    said = capfd.readouterr().err
    assert said == "marsinfer: error: device 'cuda' is not there: torch sees 0 GPUs\n"


def test_the_engines_are_measured(cluster, monkeypatch, capsys):
    """With random weights, which each worker draws for itself."""
    checkout = Path(__file__).parents[2]
    script = str(checkout / "examples" / "engine_speed.py")
    flags = ["--model", "random:tiny", "--documents", "12", "--lengths", "100-300", "--workers", "1"]
    flags += ["--methods", "sliminfer:budget=0.4/0.2/0.1", "--max-new-tokens", "2", "--no-local"]
    flags += ["--ray-address", cluster.address, "--gpus-per-worker", "0"]
    monkeypatch.setenv("PYTHONPATH", str(checkout))
    monkeypatch.setattr(sys, "argv", [script, *flags])
    runpy.run_path(script, run_name="__main__")
    told = capsys.readouterr().out
    conditions, _, head, _, row = told.splitlines()
    assert conditions.startswith("model random:tiny, device CPU, dtype float32, attention sdpa, ")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, row)]
    run = dict(zip(*cells, strict=True))
    assert (run["method"], run["engine"], run["errors"]) == ("sliminfer:budget=0.4/0.2/0.1", "ray 1", "0")
    assert float(run["documents/s"]) > 0
    assert run["of one worker"] == "1.00"
    assert 0 <= float(run["idle"].rstrip("%")) <= 100
    assert 0 <= float(run["load s"]) < float(run["run s"])  # 0.0 where it took less than 0.05 s


def test_a_machine_that_is_gone_costs_no_row(batch, cluster, orders, expected):
    """Last in this file: the second machine does not come back."""
    orders.write_text(json.dumps({"pack": 5, "node": "second"}))
    code, rows, said = batch("ray", *RAY, "--ray-address", cluster.address)
    assert not orders.exists()
    assert code == 0
    assert rows == expected
    assert GONE in said.err
