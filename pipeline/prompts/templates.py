"""Prompt templates of a user's own: Jinja text over `document`, `question`, `system` and columns of `row`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment as Environment

from pipeline.errors import ConfigError
from pipeline.prompts.trial import LONG_TEXT, check_ends
from pipeline.records import Turn

NAMES = ("document", "question", "system")
ROW = "row."  # in front of a column's name it is that of a user text
SENTINELS = {name: f"Mars{name.title()}Sentinel7c1e49" for name in NAMES}
# what templates raise, and, with the rest, one that calls itself without end or makes a text without end
EXPECTED = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
RENDER_ERRORS = (*EXPECTED, RecursionError, MemoryError)
_ACCESS = (nodes.Getattr, nodes.Getitem)
_PLAIN = (nodes.Output, nodes.TemplateData, nodes.Name, nodes.If, nodes.Const)


def sentinels(columns: Iterable[str]) -> dict[str, str]:
    """What stands for each user text of a template that writes these columns, by the text's name."""
    marks = {name: blake2b(name.encode(errors="replace"), digest_size=8).hexdigest() for name in columns}
    return {**SENTINELS, **{f"{ROW}{name}": f"MarsRow{mark}Sentinel7c1e49" for name, mark in marks.items()}}


class RowFields:
    """The columns of a row as a template sees them: `row.name` and `row["a name"]`, and nothing else."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.__values = values

    def __getitem__(self, name: str) -> str:
        return self.__values[name]


def told(error: BaseException) -> str:
    """The error in words, as some have none of their own."""
    if isinstance(error, RecursionError):
        return "it calls itself without end, or is nested too deeply"
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True)
class FileTemplate:
    """The text of a template, checked when it is made: raises `ConfigError`."""

    text: str

    what = "prompt template"
    remedy = "write {{ document }}, {{ question }} and {{ system }} without filter or condition on them"
    error = ConfigError

    def __post_init__(self) -> None:
        try:
            tree = _environment().parse(self.text)
            # of texts and names alone, which nothing can make long
            columns = {id(node) for node in tree.find_all(_ACCESS) if _column(node) is not None}
            is_plain = all(
                isinstance(node, _PLAIN) or id(node) in columns for node in tree.find_all(nodes.Node)
            )
            if not is_plain:
                check_ends(f"file\0{self.text}", lambda: self._tried(tree))
            _check_names(tree)
        except TemplateSyntaxError as error:
            raise ConfigError(f"prompt template line {error.lineno}: {error.message}") from error
        except RENDER_ERRORS as error:
            raise ConfigError(f"prompt template: {told(error)}") from error

    @property
    def asks(self) -> bool:
        """Whether it speaks of a question."""
        return "question" in meta.find_undeclared_variables(_environment().parse(self.text))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns of a row that it speaks of, in the order in which they first come."""
        tree = _environment().parse(self.text)
        return tuple(dict.fromkeys(_columns(tree)))

    @cached_property
    def conditions(self) -> frozenset[str]:
        """Those of its columns that decide what else it writes, by being empty or not."""
        tree = _environment().parse(self.text)
        tests = [node.test for node in tree.find_all(nodes.If)]
        tests += [node.test for node in tree.find_all(nodes.CondExpr)]
        return frozenset(name for test in tests for name in _columns(test))

    def render(self, fields: Mapping[str, str]) -> str:
        """The text with these user texts by their names; raises RENDER_ERRORS."""
        row = {name.removeprefix(ROW): text for name, text in fields.items() if name.startswith(ROW)}
        others = {name: text for name, text in fields.items() if not name.startswith(ROW)}
        return _compiled(self.text).render({**others, "row": RowFields(row)})

    def _tried(self, tree: nodes.Template) -> Iterator[str]:
        """What it writes for short texts and for long ones."""
        _check_names(tree)  # compiles it, which computes what is constant
        short = sentinels(self.columns)
        for fields in (short, dict.fromkeys(short, LONG_TEXT)):
            yield self.render(fields)

    def render_first(self, fields: Mapping[str, str]) -> str:
        """The same, its errors as `ConfigError`."""
        try:
            return self.render(fields)
        except RENDER_ERRORS as error:
            raise ConfigError(f"prompt template: {told(error)}") from error


def without_template(turn: Turn) -> FileTemplate:
    """What writes the texts of a whole prompt as they are."""
    return FileTemplate(turn.between.join(f"{{{{ {name} }}}}" for name in turn.texts))


def _environment() -> Environment:
    return Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@lru_cache(maxsize=8)
def _compiled(text: str) -> Template:
    """Not a part of the template itself, which goes to other processes."""
    return _environment().from_string(text)


def _column(node: nodes.Node) -> str | None:
    """The column that an expression names, as `row.name` or `row["a name"]`; None if it is neither."""
    match node:
        case nodes.Getattr(node=nodes.Name(name="row"), attr=name):
            return name
        case nodes.Getitem(node=nodes.Name(name="row"), arg=nodes.Const(value=str() as name)):
            return name
    return None


def _columns(tree: nodes.Node) -> Iterator[str]:
    """Those that a part of a template names, as often as it does."""
    for node in (tree, *tree.find_all(_ACCESS)):
        name = _column(node)
        if name is not None:
            yield name


def _check_names(tree: nodes.Template) -> None:
    """Refuse names that do not exist, and expressions on user text, which would see its sentinel."""
    unknown = meta.find_undeclared_variables(tree) - {*_environment().globals, *NAMES, "row"}
    for name in tree.find_all(nodes.Name):
        if name.name in unknown:
            where = f"prompt template line {name.lineno}"
            raise ConfigError(f"{where}: {name.name!r} is undefined; use document, question, system or row")
    _check_rows(tree)
    written = [part for output in tree.find_all(nodes.Output) for part in output.nodes]
    inside = [part.find_all(nodes.Name) for part in written if _column(part) is None]
    for name in (name for names in inside for name in names if name.name in (*NAMES, "row")):
        where = f"prompt template line {name.lineno}"
        shown = "row.name" if name.name == "row" else name.name
        raise ConfigError(f"{where}: write {{{{ {shown} }}}} alone, without filter or expression")


def _check_rows(tree: nodes.Template) -> None:
    """Refuse `row` that is not followed by the name of a column."""
    accesses = [node for node in tree.find_all(_ACCESS) if _column(node) is not None]
    named = [name for access in accesses for name in access.find_all(nodes.Name)]
    for name in tree.find_all(nodes.Name):
        if name.name == "row" and not any(name is each for each in named):
            where = f"prompt template line {name.lineno}"
            raise ConfigError(f'{where}: row takes a column\'s name, as in row.name or row["a name"]')
