"""What is said on the command line alone: where settings are, what is printed, what is only tried."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from pipeline.errors import ConfigError
from pipeline.settings.option import FILES, MESSAGES, READING, RUN, TRYING, Settings
from pipeline.settings.option import option as any_option

option = partial(any_option, in_file=False, in_environment=False)

LOG_FORMATS = ("text", "json")


@dataclass(frozen=True, kw_only=True)
class ConfigSwitch(Settings):
    """A file of settings."""

    config: str | None = option(
        None,
        metavar="FILE",
        help="TOML file of settings, named as the flags; may hold input and output.",
        shown_default="none",
        panel=READING,
    )


@dataclass(frozen=True, kw_only=True)
class QuietSwitch(Settings):
    """Silence."""

    quiet: bool = option(False, help="No progress on stderr, and no closing table.", panel=MESSAGES)


@dataclass(frozen=True, kw_only=True)
class JsonSwitch(Settings):
    """A result for programs."""

    as_json: bool = option(
        False,
        flag="--json",
        help="Print the result (of batch: summary, dry run, prompts) as JSON on stdout.",
        panel=MESSAGES,
    )


@dataclass(frozen=True, kw_only=True)
class PlotSwitch(Settings):
    """A result as a picture."""

    plot: str | None = option(
        None,
        metavar="FILE",
        help="Also draw what was measured: .png, .svg or .pdf.",
        shown_default="none",
        panel=FILES,
    )


@dataclass(frozen=True, kw_only=True)
class BatchSwitches(ConfigSwitch, QuietSwitch, JsonSwitch):
    """Of `marsinfer batch`."""

    fail_on_error: bool = option(False, help="Exit with 3 when a row failed.", panel=RUN)
    dry_run: bool = option(
        False,
        help="Read and tokenize everything, print what the run would do; no weights, no output.",
        panel=TRYING,
    )
    show_prompt: int | None = option(
        None,
        metavar="N",
        help="Print the first N prompts; no weights, no output.",
        shown_default="none",
        least=1,
        panel=TRYING,
    )
    log_format: str = option(
        "text",
        help="Messages on stderr: text, or json (one event a line).",
        choices=LOG_FORMATS,
        panel=MESSAGES,
    )
    verbose: bool = option(
        False,
        help="Print the settings as TOML for --config on stderr, and Ray's own messages.",
        panel=MESSAGES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dry_run and self.show_prompt is not None:
            raise ConfigError("--dry-run and --show-prompt exclude each other: each prints on stdout")


@dataclass(frozen=True, kw_only=True)
class CheckSwitches(ConfigSwitch, QuietSwitch):
    """Of `marsinfer check`."""


@dataclass(frozen=True, kw_only=True)
class CalibrateSwitches(ConfigSwitch, QuietSwitch, PlotSwitch):
    """Of `marsinfer calibrate`."""


@dataclass(frozen=True, kw_only=True)
class BenchSwitches(ConfigSwitch, JsonSwitch):
    """Of `marsinfer bench`."""


@dataclass(frozen=True, kw_only=True)
class AccuracySwitches(ConfigSwitch, QuietSwitch, JsonSwitch, PlotSwitch):
    """Of `marsinfer bench accuracy`."""


@dataclass(frozen=True, kw_only=True)
class DoctorSwitches(QuietSwitch, JsonSwitch):
    """Of `marsinfer doctor`."""


@dataclass(frozen=True, kw_only=True)
class MethodsSwitches(JsonSwitch):
    """Of `marsinfer methods`."""

    name: str | None = option(
        None, metavar="[NAME]", help="Tell all about one method, its parameters too.", offered="methods"
    )


@dataclass(frozen=True, kw_only=True)
class ReportSwitches(Settings):
    """Of `marsinfer report`."""

    outputs: tuple[str, ...] = option(
        (),
        metavar="OUTPUT...",
        help="Outputs of batch, or unfinished ones, whose journal is read; of two, rows are compared.",
    )
    html: str | None = option(
        None,
        metavar="FILE",
        help="Write a page that needs no network; replaces FILE.",
        shown_default="tables in the terminal",
        panel=FILES,
    )
    row: str | None = option(
        None,
        metavar="ID",
        help="One row's pruning map, by id or number, of a run with --save-selection.",
        shown_default="all rows",
        panel=FILES,
    )
    open: bool = option(False, help="Show the page of --html in a browser.", panel=FILES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.outputs:
            raise ConfigError("Missing argument 'OUTPUT...'")
        if self.open and self.html is None:
            raise ConfigError("--open shows the page of --html FILE: give that too")
        if self.row is not None and len(self.outputs) != 1:
            raise ConfigError("--row takes one output, in which that row is")
