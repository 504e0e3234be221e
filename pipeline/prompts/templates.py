"""Prompt templates of a user's own: Jinja text over `document`, `question` and `system`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment as Environment

from pipeline.errors import ConfigError
from pipeline.prompts.trial import LONG_TEXT, check_ends

NAMES = ("document", "question", "system")
SENTINELS = {name: f"Mars{name.title()}Sentinel7c1e49" for name in NAMES}
# what templates raise, and, with the rest, one that calls itself without end or makes a text without end
EXPECTED = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
RENDER_ERRORS = (*EXPECTED, RecursionError, MemoryError)
_PLAIN = (nodes.Output, nodes.TemplateData, nodes.Name, nodes.If, nodes.Const)


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
            is_plain = all(isinstance(node, _PLAIN) for node in tree.find_all(nodes.Node))
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

    def render(self, fields: Mapping[str, str]) -> str:
        """The text with these fields, of which those that are not there are empty; raises RENDER_ERRORS."""
        return _compiled(self.text).render(dict(fields))

    def _tried(self, tree: nodes.Template) -> Iterator[str]:
        """What it writes for short texts and for long ones."""
        _check_names(tree)  # compiles it, which computes what is constant
        for fields in (SENTINELS, dict.fromkeys(NAMES, LONG_TEXT)):
            yield self.render(fields)

    def render_first(self, fields: Mapping[str, str]) -> str:
        """The same, its errors as `ConfigError`."""
        try:
            return self.render(fields)
        except RENDER_ERRORS as error:
            raise ConfigError(f"prompt template: {told(error)}") from error


def _environment() -> Environment:
    return Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@lru_cache(maxsize=8)
def _compiled(text: str) -> Template:
    """Not a part of the template itself, which goes to other processes."""
    return _environment().from_string(text)


def _check_names(tree: nodes.Template) -> None:
    """Refuse names that do not exist, and expressions on user text, which would see its sentinel."""
    unknown = meta.find_undeclared_variables(tree) - {*_environment().globals, *NAMES}
    for name in tree.find_all(nodes.Name):
        if name.name in unknown:
            where = f"prompt template line {name.lineno}"
            raise ConfigError(f"{where}: {name.name!r} is undefined; use document, question or system")
    inside = [part.find_all(nodes.Name) for output in tree.find_all(nodes.Output) for part in output.nodes]
    for name in (name for names in inside for name in names if name.name in NAMES):
        where = f"prompt template line {name.lineno}"
        raise ConfigError(f"{where}: write {{{{ {name.name} }}}} alone, without filter or expression")
