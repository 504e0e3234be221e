"""A template as the texts that stand around user text, held against what the template really writes.

A template is rendered once with a sentinel in the place of each user text and cut there. That it does no more
with a text than write it, or trim it, is tried with texts of many kinds, and then for every prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.templates import RENDER_ERRORS, ROW, FileTemplate, sentinels, told
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
_AGAIN = "\0"  # between the name of a text and a number
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
    """What a template writes where certain user texts are given, and the others are empty."""

    template: Template
    segments: tuple[Segment, ...]  # of user texts the sentinels
    edges: Mapping[str, Edges]
    system: str

    @classmethod
    def of(cls, template: Template, *, given: Collection[str], system: str) -> Form:
        """`given` are the names of the texts beside document and system message that are not empty.

        Raises the template's `error` for one that writes a user text otherwise than as it is.
        """
        texts = {"document", *given, *(("system",) if system else ())}
        marks = sentinels(template.columns)
        fields = {name: mark if name in texts else "" for name, mark in marks.items()}
        rendered = template.render_first(fields)
        chat = isinstance(template, ChatTemplate)
        for name in fields if chat else ("document", "question", "system"):
            count = rendered.count(fields[name]) if fields[name] else 1
            if count != 1 and (chat or name != "question" or count > 1):
                what = "message" if name.startswith(ROW) else name
                fault = f"must write the {what} once and unchanged, but does so {count} times"
                raise template.error(f"the {template.what} {fault}{f'; {template.remedy}' if chat else ''}")
        segments = tuple(_segments(rendered, marks))
        edges = {_base(name): Edges() for name, _ in segments if name}
        form = cls(template, segments, edges, system)
        return replace(form, edges={name: form._edges_of(name, fields) for name in edges})

    def filled(self, texts: Mapping[str, str]) -> list[Segment]:
        """What the template writes with these texts, each without what the template takes away."""
        return [(name, texts[_base(name)] if name else text) for name, text in self.segments]

    def with_system(self) -> list[Segment]:
        """The same with sentinels for the texts that differ from row to row."""
        marks = sentinels(self.template.columns)
        return self.filled({**marks, "system": self.edges.get("system", Edges())(self.system)})

    def trimmed(self, texts: Mapping[str, str]) -> dict[str, str]:
        """User texts by their names, each without what the template takes away; empty if it is left out."""
        return {name: self.edges[name](text) if name in self.edges else "" for name, text in texts.items()}

    def check(self, texts: Mapping[str, str], expected: str) -> None:
        """Raise `RowError`, of the kind `template`, where the template really writes something else."""
        template = self.template
        try:
            real = template.render(texts)
        except RENDER_ERRORS as error:
            raise RowError(
                "template", f"the {template.what} fails for this text: {told(error)}; {template.remedy}"
            ) from error
        if real != expected:
            what = _difference(expected, real)
            raise RowError("template", f"the {template.what} changes this text: {what}; {template.remedy}")

    def _edges_of(self, name: str, fields: Mapping[str, str]) -> Edges:
        """How the template trims this text, found by trying."""
        probes: Sequence[str] = (self.system,) if name == "system" else _PROBES
        real = [self.template.render_first({**fields, name: probe}) for probe in probes]
        marks = sentinels(self.template.columns)
        texts = {**fields, **{each: marks[each] for each in self.edges}}
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


def _segments(rendered: str, marks: Mapping[str, str]) -> Iterator[Segment]:
    """The template's own texts and user texts; one that is written again has a number behind its name."""
    names = {sentinel: name for name, sentinel in marks.items()}
    times = Counter[str]()
    for piece in re.split(f"({'|'.join(names)})", rendered):
        name = names.get(piece)
        if name is None:
            if piece:
                yield None, piece
            continue
        times[name] += 1
        yield (name if times[name] == 1 else f"{name}{_AGAIN}{times[name]}"), piece


def _base(name: str) -> str:
    """The name of a user text without the number that it has where it is written again."""
    return name.partition(_AGAIN)[0]


def _difference(expected: str, real: str) -> str:
    """What stands where the two first differ."""
    here = next((i for i, (a, b) in enumerate(zip(expected, real, strict=False)) if a != b), None)
    here = min(len(expected), len(real)) if here is None else here
    return f"{expected[here : here + _SHOWN]!r} becomes {real[here : here + _SHOWN]!r}"
