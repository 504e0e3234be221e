"""The colours of a page: what is read on what is light enough and dark enough, in both themes."""

from __future__ import annotations

import re

import pytest

from pipeline.report.page import TEMPLATES

ENOUGH = 4.5  # contrast of text, by level AA of the Web Content Accessibility Guidelines 2.2
PAGE, MAP = ((TEMPLATES / name).read_text() for name in ("page.css", "map.css"))


def themes():
    """The colours of each theme by name."""
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root \{(.*?)\}", PAGE, re.DOTALL)
    )
    return {"light": light, "dark": {**light, **dark}}


def parts(colour):
    return [int(colour[n : n + 2], 16) for n in (1, 3, 5)]


def mixed(colour, share, ground):
    """What is seen of a colour that covers a ground in part."""
    pairs = zip(parts(colour), parts(ground), strict=True)
    return "#" + "".join(f"{round(share * over + (1 - share) * under):02x}" for over, under in pairs)


def luminance(colour):
    channels = [n / 255 for n in parts(colour)]
    linear = [n / 12.92 if n <= 0.04045 else ((n + 0.055) / 1.055) ** 2.4 for n in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    darker, lighter = sorted([luminance(first), luminance(second)])
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_is_that_of_the_guidelines():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("text", "ground"),
    [
        *((text, ground) for text in ("ink", "quiet") for ground in ("paper", "raised", "mark")),
        *(("accent", "paper"), ("warn", "paper"), ("ink", "differs")),
    ],
)
def test_text_stands_out(theme, text, ground):
    colours = themes()[theme]
    assert contrast(colours[text], colours[ground]) >= ENOUGH


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_tinted_and_pale_tokens_can_be_read(theme):
    colours = themes()[theme]
    shades = [int(share) / 100 for share in re.findall(r"\.d\d \{.*?--tier-full\) (\d+)%", MAP)]
    fades = [float(fade) for fade in re.findall(r"\.(?:e\d|left) \{ opacity: ([\d.]+); \}", MAP)]
    assert (len(shades), len(fades)) == (7, 4)
    tiers = [(tier, 0.45) for tier in ("full", "fp8")] + [("full", share) for share in shades]
    for tier, share in tiers:
        assert contrast(colours["ink"], mixed(colours[f"tier-{tier}"], share, colours["paper"])) >= ENOUGH
    for fade in fades:
        assert contrast(mixed(colours["ink"], fade, colours["paper"]), colours["paper"]) >= ENOUGH


def test_paper_has_the_light_theme():
    assert "@media screen and (prefers-color-scheme: dark)" in PAGE
    assert PAGE.count("prefers-color-scheme") == 1
    assert MAP.count("prefers-color-scheme") == 0
    for style in (PAGE, MAP):
        assert "@media print" in style
