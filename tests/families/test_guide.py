"""The guide's table of families against the program."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from family_cases import CASES, SLIDING, WINDOW, model_of

from pipeline.checkpoints.gguf_families import ARCHITECTURES
from pipeline.checkpoints.quantised import MXFP4_FAMILIES
from pipeline.errors import ConfigError
from pipeline.families.supported import FAMILIES
from pipeline.pruning.registry import method_class, method_names

GUIDE = Path(__file__).parents[2] / "examples/guides/models.md"
IN_FILES_OF = {"mistral": "llama"}  # which name another architecture


def table():
    """{family: (GGUF, MXFP4, methods)}, each as it is written."""
    section = re.search(r"^## Families\n(.*?)^## ", GUIDE.read_text(encoding="utf-8"), re.M | re.S)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.split("\n") if line]
    return {row[0].strip("`"): tuple(row[1:4]) for row in rows if row[0].strip("`") in FAMILIES}


def test_all_families_and_their_kinds_of_files_are_told():
    told = table()
    assert list(told) == list(FAMILIES)
    for family, (gguf, mxfp4, _) in told.items():
        architecture = ARCHITECTURES.get(family) or IN_FILES_OF.get(family)
        assert gguf == (f"`{architecture}`" if architecture else "no"), family
        assert mxfp4 == ("yes" if family in MXFP4_FAMILIES else "no"), family


def test_methods_that_windows_leave_are_told():
    with_windows = {CASES[name][0] for name in SLIDING}
    told = {family for family, (_, _, methods) in table().items() if methods != "all"}
    assert told == with_windows
    shape = model_of("gemma3_text").shape
    all_slide = replace(shape, windows=(WINDOW,) * shape.layers)
    always, sometimes = (
        [name for name in method_names() if method_class(name).suits(each)] for each in (all_slide, shape)
    )
    words = "with windows " + " and ".join(f"`{name}`" for name in always)
    assert {methods for _, _, methods in table().values()} == {"all", words}
    (further,) = set(sometimes) - set(always)
    assert f"`{further}` too where some layers have none" in " ".join(GUIDE.read_text("utf-8").split())


@pytest.mark.parametrize("name", SLIDING)
def test_the_others_are_refused(name):
    shape = model_of(name).shape
    for method in method_names():
        if not method_class(method).suits(shape):
            with pytest.raises(ConfigError, match="does not suit this model"):
                method_class(method)().check_depth(shape)
