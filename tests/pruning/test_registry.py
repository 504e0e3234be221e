"""Methods by name: what is accepted, and what a wrong name or setting says."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import tiny_model

from pipeline.errors import ConfigError
from pipeline.pruning.limits import limits_of
from pipeline.pruning.registry import METHODS, make_method, method_class, told


def test_text_settings_become_numbers():
    method = make_method("marsinfer", {"eta": "0.9", "start_layer": "4", "share": "none"})
    assert (method.eta, method.start_layer, method.share) == (0.9, 4, None)
    assert make_method("marsinfer", {"eta": "0.9,0.8"}).eta == (0.9, 0.8)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "marsinfr",
            {},
            "unknown method 'marsinfr' (did you mean 'marsinfer'?); methods: cascade, dense, fastkv, "
            "ffn-skip, frugal, gemfilter, hip, mars, marsinfer, sliminfer, speculative, uniprefill "
            "(or FILE.py:Class for one of your own)",
        ),
        (
            "marsinfer",
            {"etta": "1"},
            "method marsinfer has no parameter 'etta' (did you mean 'eta'?); "
            "it has: eta, eta_high, low, prefix, share, share_high, sparse_attention, start_layer, window",
        ),
        ("marsinfer", {"eta": "high"}, "eta=high does not fit: it must be a number"),
        ("marsinfer", {"window": "1.5"}, "window=1.5 does not fit: it must be a whole number"),
        ("dense", {"eta": "1"}, "method dense has no parameter 'eta'; it has: sparse_attention"),
        ("pipeline.records:Row", {}, "method 'pipeline.records:Row' is not a PruningMethod"),
    ],
)
def test_what_cannot_work_says_why(name, settings, message):
    with pytest.raises(ConfigError) as caught:
        make_method(name, settings)
    assert str(caught.value) == message


def test_a_method_file_that_is_not_there():
    with pytest.raises(ConfigError, match=r"^method 'nowhere.py:Mine' cannot be loaded: .*No such file"):
        make_method("nowhere.py:Mine")


def test_checking_a_name_imports_no_torch():
    code = (
        "import sys; from pipeline.pruning.registry import check_method_name; "
        "check_method_name('marsinfer'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_file_that_does_not_postpone_annotations(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "from pipeline.pruning.base import KEEP_ALL, PruningMethod, setting\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(PruningMethod):\n"
        "    name = 'mine'\n"
        "    heads: str = setting('mean', 'what of the heads')\n"
        "    share: float = setting(0.5, 'share')\n"
        "    window: int | None = setting(3, 'tokens')\n"
        "    def select(self, layer, view, state):\n"
        "        return KEEP_ALL\n"
    )
    made = make_method(f"{path}:Mine", {"heads": "max", "share": "0.25", "window": "none"})
    assert (made.heads, made.share, made.window) == ("max", 0.25, None)
    assert make_method(f"{path}:Mine", {"window": "7"}).window == 7


def layer_settings():
    for name in sorted(METHODS):
        for parameter in fields(method_class(name)):
            if limits_of(parameter).is_layer:
                yield name, parameter.name


@pytest.mark.parametrize(("name", "parameter"), list(layer_settings()))
def test_a_layer_beyond_the_depth_is_refused_by_every_method(name, parameter):
    shape = tiny_model("llama").shape
    others = {each: 0 for method, each in layer_settings() if method == name}
    others |= {"budget": 0.5} if name == "sliminfer" else {}
    make_method(name, others | {parameter: shape.layers - 1}).plan(shape, [10])
    with pytest.raises(ConfigError, match=rf"^{parameter}=4, and the model has layers 0 to 3$"):
        make_method(name, others | {parameter: shape.layers}).plan(shape, [10])


OWN = """
from dataclasses import dataclass

from pipeline.pruning.marsinfer import MarsInfer


@dataclass(frozen=True, kw_only=True)
class Own(MarsInfer):
    def score(self, layer, view):
        return {}view.keys[:, 0, 0]
"""


def test_the_code_of_a_method_of_ones_own_decides_its_answers(tmp_path):
    """Its name does not tell, which may even be that of the method that it is made of."""
    path, found = tmp_path / "own.py", []
    for sign in ("", "-", ""):
        path.write_text(OWN.format(sign))
        found.append(told(make_method(f"{path}:Own")))
    assert found[0] == found[2] != found[1]
    assert found[0] == {**told(make_method("marsinfer")), "code_sha256": found[0]["code_sha256"]}
    assert len(found[0]["code_sha256"]) == 64


def test_the_code_is_that_which_was_loaded(tmp_path):
    """Though its file is edited meanwhile, even to what is no Python, or another of its name is loaded."""
    made = []
    for folder, sign in (("one", ""), ("other", "-")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.py").write_text(OWN.format(sign))
        made.append(make_method(f"{tmp_path / folder / 'own.py'}:Own"))
    (tmp_path / "other" / "own.py").write_text("def (")
    codes = [told(each)["code_sha256"] for each in made]
    for sign, code in zip(("", "-"), codes, strict=True):
        (tmp_path / "own.py").write_text(OWN.format(sign))
        assert told(make_method(f"{tmp_path / 'own.py'}:Own"))["code_sha256"] == code
    assert codes[0] != codes[1]
