"""A template as the texts that stand around user text, held against what the template really writes.

A template is rendered once with a sentinel in the place of each user text and cut there. That it does no more
with a text than write it, or trim it, is tried with texts of many kinds, and then for every prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.templates import NAMES, RENDER_ERRORS, SENTINELS, FileTemplate, told
from pipeline.prompts.tokenizing import Segment
from pipeline.records import RowError

Template = ChatTemplate | FileTemplate

_MARKED = 'it\'s "so" & <b>\\n {{ x }} {% y %} %s \u00e9\u6570\U0001f642\u2028 a  b\tc\r\nd\n\n\n## e'
_PROBES = (
    "a",
    _MARKED,
    f"\n \t\u3000{_MARKED}\u00a0\r\n \n",
    f" \n{_MARKED}\n ",
    *("word " * (length // 5) + "." for length in (100, 1_000, 10_000, 300_000)),
)
_SHOWN = 24  # characters of a difference
_SHORT = 40  # characters of a text whose length needs no telling


@dataclass(frozen=True)
class Edges:
    """What a template takes away from a text: these characters, or all white space, on its left or right."""

    left: bool = False
    right: bool = False
    characters: str | None = None

    def __call__(self, text: str) -> str:
        text = text.lstrip(self.characters) if self.left else text
        return text.rstrip(self.characters) if self.right else text


_EDGES = (
    Edges(),
    *(
        Edges(left, right, characters)
        for characters in (None, "\n", " ", " \n")
        for left, right in ((True, True), (True, False), (False, True))
    ),
)


@dataclass(frozen=True)
class Form:
    """What a template writes with a question, or without one."""

    template: Template
    segments: tuple[Segment, ...]  # of user texts the sentinels
    edges: Mapping[str, Edges]
    system: str

    @classmethod
    def of(cls, template: Template, *, asks: bool, system: str) -> Form:
        """Raises the template's `error` for one that writes a user text otherwise than as it is."""
        given = {"document": True, "question": asks, "system": bool(system)}
        fields = {name: SENTINELS[name] if given[name] else "" for name in NAMES}
        rendered = template.render_first(fields)
        chat = isinstance(template, ChatTemplate)
        for name, sentinel in fields.items():
            count = rendered.count(sentinel) if sentinel else 1
            if count != 1 and (chat or name != "question" or count > 1):
                fault = f"must write the {name} once and unchanged, but does so {count} times"
                raise template.error(f"the {template.what} {fault}{f'; {template.remedy}' if chat else ''}")
        segments = tuple(_segments(rendered))
        edges = {name: Edges() for name, _ in segments if name}
        form = cls(template, segments, edges, system)
        probes = {"document": _PROBES, "question": _PROBES, "system": (system,)}
        return replace(form, edges={name: form._edges_of(name, probes[name], fields) for name in edges})

    def filled(self, texts: Mapping[str, str]) -> list[Segment]:
        """What the template writes with these texts, each without what the template takes away."""
        return [(name, texts[name] if name else text) for name, text in self.segments]

    def with_system(self) -> list[Segment]:
        """The same with sentinels for the texts that differ from row to row."""
        return self.filled({**SENTINELS, "system": self.edges.get("system", Edges())(self.system)})

    def trimmed(self, document: str, question: str) -> dict[str, str]:
        given = {"document": document, "question": question, "system": self.system}
        return {name: self.edges[name](text) if name in self.edges else "" for name, text in given.items()}

    def check(self, document: str, question: str, expected: str) -> None:
        """Raise `RowError`, of the kind `template`, where the template really writes something else."""
        template = self.template
        try:
            real = template.render({"document": document, "question": question, "system": self.system})
        except RENDER_ERRORS as error:
            raise RowError(
                "template", f"the {template.what} fails for this text: {told(error)}; {template.remedy}"
            ) from error
        if real != expected:
            what = _difference(expected, real)
            raise RowError("template", f"the {template.what} changes this text: {what}; {template.remedy}")

    def _edges_of(self, name: str, probes: Sequence[str], fields: Mapping[str, str]) -> Edges:
        """How the template trims this text, found by trying."""
        real = [self.template.render_first({**fields, name: probe}) for probe in probes]
        texts = {**fields, **{each: SENTINELS[each] for each in self.edges}}
        most: tuple[int, str] = (-1, "")
        for edges in _EDGES:
            expected = [self._text({**texts, name: edges(probe)}) for probe in probes]
            wrong = [n for n, (one, other) in enumerate(zip(expected, real, strict=True)) if one != other]
            if not wrong:
                return edges
            right = len(probes) - len(wrong)
            if right > most[0]:
                length = len(probes[wrong[0]])
                size = f", in one of {length:,} characters" if length > _SHORT else ""
                most = right, _difference(expected[wrong[0]], real[wrong[0]]) + size
        raise self.template.error(
            f"the {self.template.what} changes the {name}: {most[1]}; {self.template.remedy}"
        )

    def _text(self, texts: Mapping[str, str]) -> str:
        return "".join(text for _, text in self.filled(texts))


def _segments(rendered: str) -> Iterator[Segment]:
    names = {sentinel: name for name, sentinel in SENTINELS.items()}
    for piece in re.split(f"({'|'.join(names)})", rendered):
        if piece:
            yield names.get(piece), piece


def _difference(expected: str, real: str) -> str:
    """What stands where the two first differ."""
    here = next((i for i, (a, b) in enumerate(zip(expected, real, strict=False)) if a != b), None)
    here = min(len(expected), len(real)) if here is None else here
    return f"{expected[here : here + _SHOWN]!r} becomes {real[here : here + _SHOWN]!r}"
