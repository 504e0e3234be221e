"""Finding a method by name, without importing the others (or torch) before it is asked for."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import linecache
import sys
from collections.abc import Iterable, Mapping
from dataclasses import Field, asdict, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from pipeline.pruning.base import PruningMethod

METHODS = {
    "cascade": "pipeline.pruning.cascade:Cascade",
    "dense": "pipeline.pruning.dense:Dense",
    "fastkv": "pipeline.pruning.fastkv:FastKV",
    "ffn-skip": "pipeline.pruning.ffn_skip:FfnSkip",
    "frugal": "pipeline.pruning.frugal:Frugal",
    "gemfilter": "pipeline.pruning.gemfilter:GemFilter",
    "hip": "pipeline.pruning.hip:Hip",
    "mars": "pipeline.pruning.mars:Mars",
    "marsinfer": "pipeline.pruning.marsinfer:MarsInfer",
    "sliminfer": "pipeline.pruning.sliminfer:SlimInfer",
    "speculative": "pipeline.pruning.speculative:Speculative",
    "uniprefill": "pipeline.pruning.uniprefill:UniPrefill",
}


def method_names() -> list[str]:
    return sorted(METHODS)


def brings_code(name: str) -> bool:
    """Whether a method is a class of the user's own, named as `module:Class` or `FILE.py:Class`."""
    return ":" in name and name not in METHODS


def check_method_name(name: str) -> None:
    """Raise ConfigError for a name that cannot be a method; imports nothing."""
    if name not in METHODS and not brings_code(name):
        raise ConfigError(
            f"unknown method {name!r}{did_you_mean(name, METHODS)}; methods: {', '.join(method_names())} "
            "(or FILE.py:Class for one of your own)"
        )


def method_class(name: str) -> type[PruningMethod]:
    """The class registered under `name`, or named as `module:Class` or `FILE.py:Class`.

    Raises ConfigError when there is no such method.
    """
    check_method_name(name)
    where, _, class_name = METHODS.get(name, name).rpartition(":")
    from pipeline.pruning.base import PruningMethod

    try:
        module = _load_file(where) if where.endswith(".py") else importlib.import_module(where)
        found = getattr(module, class_name)
    except (ImportError, OSError, AttributeError, SyntaxError, ValueError) as error:
        raise ConfigError(f"method {name!r} cannot be loaded: {error}") from error
    if not (isinstance(found, type) and issubclass(found, PruningMethod)):
        raise ConfigError(f"method {name!r} is not a PruningMethod")
    _digest(_own_classes(found))  # of what has just been loaded
    return found


def make_method(name: str, settings: Mapping[str, Any] | None = None) -> PruningMethod:
    """A pruning method with its settings, an immutable object that `run_batch` and `prefill` take.

    `name` is one of `method_names()`, or `module:Class` or `FILE.py:Class` of your own. `settings` are its
    parameters, as values or as text, such as "0.95", "none" or "0.4,0.2" for several; the others keep their
    defaults, those of the method's source, which its class names in `source`. `marsinfer methods NAME` shows
    all of them, with what was chosen where the source is silent.

    Raises ConfigError for an unknown method or parameter, and for a value that does not fit.
    """
    found = method_class(name)
    parameters = {field.name: field for field in fields(found)}
    values = {}
    for key, value in (settings or {}).items():
        if key not in parameters:
            known = ", ".join(sorted(parameters)) or "none"
            raise ConfigError(
                f"method {name} has no parameter {key!r}{did_you_mean(key, parameters)}; it has: {known}"
            )
        values[key] = _parse(parameters[key], value) if isinstance(value, str) else value
    return found(**values)


def told(method: PruningMethod) -> dict[str, Any]:
    """What decides the answers of a method, as plain values: name, settings, and the code of one's own.

    Of a class outside of the program, whose name says nothing of what it does today, that is a digest of the
    files in which it and the classes above it are written, in hex, as they were when `make_method` loaded it,
    or at the first look; None where their text cannot be had.
    """
    plain = {"name": method.name, "settings": asdict(method)}
    classes = _own_classes(type(method))
    return {**plain, "code_sha256": _digest(classes)} if classes else plain


def _own_classes(method: type) -> list[type]:
    """Of a method's class and those above it the ones that neither this program nor Python brings."""
    known = {__name__.partition(".")[0], *sys.stdlib_module_names}
    return [each for each in method.__mro__ if each.__module__.partition(".")[0] not in known]


def _digest(classes: Iterable[type]) -> str | None:
    texts = [_text_digest(each) for each in classes]
    known = [text for text in texts if text is not None]
    return hashlib.sha256(b"".join(known)).hexdigest() if len(known) == len(texts) else None


@cache  # a file may be edited, or another of its name be loaded, while the class is in use
def _text_digest(of: type) -> bytes | None:
    try:
        file = inspect.getsourcefile(of) or ""
    except (OSError, TypeError):
        return None
    linecache.checkcache(file)
    lines = linecache.getlines(file)
    return hashlib.sha256("".join(lines).encode(errors="surrogatepass")).digest() if lines else None


def _load_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"marsinfer_method_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up to resolve annotations
    spec.loader.exec_module(module)
    return module


def _parse(parameter: Field[Any], text: str) -> Any:
    """Text as a number, `none`, a comma-separated tuple of numbers, true/false, or itself: as declared."""
    # a class itself where the method's file does not postpone annotations
    kind = parameter.type.__name__ if isinstance(parameter.type, type) else str(parameter.type)
    if "None" in kind and text.lower() == "none":
        return None
    if "tuple" in kind and "," in text:
        return tuple(_number(parameter.name, part, kind) for part in text.split(","))
    if "bool" in kind and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return text if kind.startswith("str") else _number(parameter.name, text, kind)


def _number(name: str, text: str, kind: str) -> float:
    convert = float if "float" in kind else int
    try:
        return convert(text)
    except ValueError:
        expected = "a number" if convert is float else "a whole number"
        raise ConfigError(f"{name}={text} does not fit: it must be {expected}") from None
