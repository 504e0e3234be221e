"""What `pipeline` exports: listed, loaded on first use, and explained by pydoc."""

from __future__ import annotations

import gc
import inspect
import json
import pkgutil
import pydoc
import subprocess
import sys
from importlib.metadata import version

import pytest

import pipeline


def test_importing_the_package_imports_nothing_else():
    code = (
        "import json, sys; before = set(sys.modules); import pipeline; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert not {"torch", "numpy", "pyarrow", "transformers"} & set(json.loads(done.stdout))
    assert set(pipeline.__all__) <= set(dir(pipeline))


def test_the_version_is_that_of_the_package_and_imports_nothing_heavy():
    code = "import json, sys, pipeline; print(json.dumps([pipeline.__version__, sorted(sys.modules)]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    told, modules = json.loads(done.stdout)
    assert told == version("marsinfer")
    assert not {"torch", "numpy", "pyarrow", "transformers", "typer"} & set(modules)
    assert "__version__" in dir(pipeline)


@pytest.mark.parametrize("name", pipeline.__all__)
def test_pydoc_explains_what_is_exported(name):
    shown = pydoc.render_doc(pipeline, renderer=pydoc.plaintext)
    explained = inspect.getdoc(getattr(pipeline, name))
    assert len(explained.splitlines()) > 3
    assert explained.splitlines()[0] in shown


@pytest.mark.parametrize(
    "name", ["run_batch", "answer", "check", "calibrate", "load_model", "make_method", "BatchConfig"]
)
def test_what_can_be_raised_is_said(name):
    assert "Raises " in inspect.getdoc(getattr(pipeline, name))


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'run_batches'"):
        pipeline.run_batches  # noqa: B018


@pytest.mark.parametrize(
    ("option", "hint"), [("max_new_token", " (did you mean 'max_new_tokens'?)"), ("qqq", "")]
)
def test_an_unknown_option_is_named(option, hint):
    with pytest.raises(pipeline.MarsError) as refused:
        pipeline.run_batch("in.jsonl", "out.jsonl", **{option: 1})
    told = f"run_batch has no option {option!r}{hint}; it takes those of BatchConfig"
    assert str(refused.value) == told


def test_paths_and_how_a_summary_prints(fish, tmp_path, model_folder):
    options = {"text_column": "body", "question_column": "ask", "max_new_tokens": 1, "device": "cpu"}
    out = tmp_path / "out.jsonl"
    summary = pipeline.run_batch(fish, out, model=str(model_folder), method="dense", **options)
    assert str(summary).startswith(f"dense: {out}: 3 rows (3 ok); 686 prompt tokens, 3 new tokens; ")
    assert repr(summary) == f"<Summary {summary}>"
    resumed = [fish], out
    assert pipeline.run_batch(*resumed, model=str(model_folder), method="dense", resume=True, **options)


@pytest.mark.parametrize("function", ["answer", "check", "calibrate"])
def test_every_function_names_an_unknown_option(function):
    with pytest.raises(
        pipeline.MarsError, match=rf"^{function} has no option 'max_new_token' \(did you mean"
    ):
        getattr(pipeline, function)(["in.jsonl"], max_new_token=1)


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("max_new_tokens", "many", "max_new_tokens = 'many': must be a whole number"),
        ("max_new_tokens", 1.5, "max_new_tokens = 1.5: must be a whole number"),
        ("pack_tokens", "lots", "pack_tokens"),
        ("resume", 1, "resume = 1: must be true or false"),
        ("stop", [3], r"stop = \[3\]: must be a text or a list of texts"),
        ("text_column", ["a"], r"text_column = \['a'\]: must be a text"),
    ],
)
def test_a_value_of_another_type_is_told_with_its_option(option, value, told):
    with pytest.raises(pipeline.MarsError, match=told):
        pipeline.run_batch("in.jsonl", "out.jsonl", **{option: value})


def test_a_path_stands_for_any_text_and_a_list_for_several(fish, tmp_path, model_folder):
    template = tmp_path / "template.txt"
    template.write_text("{{ document }} {{ question }}", encoding="utf-8")
    options = {"text_column": "body", "question_column": "ask", "prompt_template": template, "stop": ["fish"]}
    sizes = {"pack_tokens": "1k", "kv_memory": None, "max_new_tokens": 1, "device": "cpu"}
    out = tmp_path / "out.jsonl"
    summary = pipeline.run_batch([fish], out, model=model_folder, **options, **sizes)
    assert summary.status == {"ok": 3}


def test_no_module_has_the_name_of_what_is_exported():
    """Importing it would put the module in the place of a function such as `check`."""
    modules = {module.name for module in pkgutil.iter_modules(pipeline.__path__)}
    assert "run" in modules
    assert not modules & set(pipeline.__all__)


def test_a_model_is_loaded_from_a_path_and_an_unknown_option_is_named(model_folder):
    assert pipeline.load_model(model_folder, device="cpu").name == str(model_folder)
    with pytest.raises(
        pipeline.MarsError, match=r"^load_model has no option 'devise' \(did you mean 'device'"
    ):
        pipeline.load_model(model_folder, devise="cpu")
    with pytest.raises(pipeline.MarsError, match=r"--adapter .*: there is no such folder"):
        pipeline.load_model(model_folder, adapter=model_folder / "none")


def test_check_takes_a_loaded_model_and_a_method_object(fish, model_folder):
    model = pipeline.load_model(str(model_folder), device="cpu")
    method = pipeline.make_method("marsinfer", {"start_layer": 1})
    options = {"text_column": "body", "question_column": "ask", "scope": "rows", "max_new_tokens": 2}
    result = pipeline.check(fish, model=model, method=method, **options)
    assert repr(result).startswith(f"<CheckResult {result.verdict}: marsinfer against dense, 3 rows; drops: ")


def test_calibrate_tells_that_documents_are_too_few(fish, tmp_path, model_folder):
    options = {"text_column": "body", "question_column": "ask", "out": tmp_path / "profile.toml"}
    with pytest.raises(pipeline.MarsError, match="documents in all"):
        pipeline.calibrate(fish, model=model_folder, **options)


def test_a_package_that_is_not_installed_has_a_version_even_so(monkeypatch):
    from pipeline.texts import versions

    def absent(name):
        raise versions.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", absent)
    assert pipeline.__version__ == "unknown (not installed)"


def test_a_run_gives_back_what_it_held_beside_the_model(fish, tmp_path, model_folder):
    """Else the next run of the same process finds a device that is nearly full."""
    from pipeline.model.store import KvStore

    options = {"text_column": "body", "question_column": "ask", "max_new_tokens": 3, "device": "cpu"}
    gc.collect()
    gc.disable()  # nothing is to be freed by chance
    try:
        before = sum(isinstance(each, KvStore) for each in gc.get_objects())
        pipeline.run_batch(str(fish), str(tmp_path / "out.jsonl"), model=str(model_folder), **options)
        assert sum(isinstance(each, KvStore) for each in gc.get_objects()) == before
    finally:
        gc.enable()
