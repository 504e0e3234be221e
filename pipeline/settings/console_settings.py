"""What is said on the command line alone: where settings are, what is printed, what is only tried."""

from __future__ import annotations

from functools import partial

from pipeline.errors import ConfigError
from pipeline.settings.option import FILES, MESSAGES, READING, RUN, TRYING, Settings
from pipeline.settings.option import option as any_option
from pipeline.settings.run_settings import OverwriteSettings

option = partial(any_option, in_file=False, in_environment=False)


class ConfigSwitch(Settings, panel=READING):
    """A file of settings."""

    config: str | None = option(
        None, metavar="FILE", help="TOML file of settings, named as the flags; may hold input and output."
    )


class QuietSwitch(Settings, panel=MESSAGES):
    """Silence."""

    quiet: bool = option(
        False,
        help="No progress on stderr; of batch, no closing table either. Results, notes and errors stay.",
    )


class JsonSwitch(Settings, panel=MESSAGES):
    """A result for programs."""

    as_json: bool = option(
        False, flag="--json", help="Print the result (of batch: summary, dry run, prompts) as JSON on stdout."
    )


class PlotSwitch(Settings, panel=FILES):
    """A result as a picture."""

    plot: str | None = option(None, metavar="FILE", help="Also draw what was measured: .png, .svg or .pdf.")


class BatchSwitches(ConfigSwitch, QuietSwitch, JsonSwitch, panel=TRYING):
    """Of `marsinfer batch`."""

    fail_on_error: bool = option(False, help="Exit with 3 when a row failed.", panel=RUN)
    dry_run: bool = option(
        False, help="Read and tokenize everything, print what the run would do; no weights, no output."
    )
    show_prompt: int | None = option(
        None, metavar="N", help="Print the first N prompts; no weights, no output.", least=1
    )
    log_format: str = option(
        "text",
        help="Messages on stderr: text, or json (one event a line).",
        choices=("text", "json"),
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


class CheckSwitches(ConfigSwitch, QuietSwitch):
    """Of `marsinfer check`."""


class CalibrateSwitches(ConfigSwitch, QuietSwitch, PlotSwitch):
    """Of `marsinfer calibrate`."""


class BenchSwitches(ConfigSwitch, JsonSwitch):
    """Of `marsinfer bench`."""


class AccuracySwitches(ConfigSwitch, QuietSwitch, JsonSwitch, PlotSwitch):
    """Of `marsinfer bench accuracy`."""


class DoctorSwitches(QuietSwitch, JsonSwitch):
    """Of `marsinfer doctor`."""


class MethodsSwitches(JsonSwitch):
    """Of `marsinfer methods`."""

    name: str | None = option(
        None,
        metavar="[NAME]",
        help="Tell all about one method, its parameters too.",
        offered="methods",
        panel=None,
    )


class MergeSwitches(OverwriteSettings, panel=RUN):
    """Of `marsinfer merge`."""

    merged: str = option(
        "",
        may_be_empty=True,
        metavar="OUT",
        help="The output to write: .parquet, .arrow, .arrows or .jsonl, on this machine.",
        panel=None,
    )
    merged_from: tuple[str, ...] = option(
        (), metavar="SHARD...", help="Finished outputs of batch, with the same settings.", panel=None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.merged and self.merged_from):
            missing = "SHARD..." if self.merged else "OUT"
            raise ConfigError(f"Missing argument '{missing}'")


class ReportSwitches(Settings, panel=FILES):
    """Of `marsinfer report`."""

    outputs: tuple[str, ...] = option(
        (),
        metavar="OUTPUT...",
        help="Outputs of batch, or unfinished ones, whose journal is read; of two, rows are compared.",
        panel=None,
    )
    html: str | None = option(
        None,
        metavar="FILE",
        help="Write a page that needs no network; replaces one that it wrote.",
        shown_default="tables in the terminal",
    )
    row: str | None = option(
        None,
        metavar="ID",
        help="One row's pruning map, by id or number, of a run with --save-selection.",
        shown_default="all rows",
    )
    open: bool = option(False, help="Show the page of --html in a browser.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.outputs:
            raise ConfigError("Missing argument 'OUTPUT...'")
        if self.open and self.html is None:
            raise ConfigError("--open shows the page of --html FILE: give that too")
        if self.row is not None and len(self.outputs) != 1:
            raise ConfigError("--row takes one output, in which that row is")
