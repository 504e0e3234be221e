"""How a batch runs and is written, and its whole configuration."""

from __future__ import annotations

from pipeline.errors import ConfigError
from pipeline.outputs.own_columns import ANSWERS, SKIPPED_FFNS, check_column
from pipeline.settings.answer_settings import COLDEST, SamplingSettings, SeveralSettings
from pipeline.settings.data_settings import DataSettings
from pipeline.settings.form_settings import FormSettings
from pipeline.settings.kinds import BYTES, COUNT, TEXT_OR_WHOLE, WORDS
from pipeline.settings.method_settings import AUTO, IN_STEPS, KV_DTYPES, MethodSettings
from pipeline.settings.model_settings import ModelSettings, ParallelSettings
from pipeline.settings.moments import parse_deadline
from pipeline.settings.option import METHOD, READING, RUN, Settings, option
from pipeline.settings.parse import parse_lookup, parse_max_errors, parse_workers
from pipeline.settings.prompt_settings import SplitSettings
from pipeline.settings.validity_settings import ValiditySettings


class EngineSettings(Settings, panel=RUN):
    """Where rows are answered: in this process, or by workers on as many GPUs and machines as there are."""

    engine: str = option(
        "local",
        help="local (this process, one device) or ray (workers, each with a model).",
        choices=("local", "ray"),
    )
    ray_address: str | None = option(
        None,
        metavar="HOST:PORT",
        help="With --engine ray: the cluster that this machine belongs to, or auto, which finds it.",
        shown_default="a Ray of the run's own, here",
    )
    workers: str = option(
        "all",
        metavar="N|all",
        help="With --engine ray: how many; all is one for each GPU, or CPU core where there is none.",
        kind=TEXT_OR_WHOLE,
    )
    gpus_per_worker: int | None = option(
        None,
        metavar="1|0",
        help="With --engine ray: a GPU for each worker, or a CPU core.",
        shown_default="1 where there are GPUs",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine == "local":
            given = (self.ray_address, self.gpus_per_worker, None if self.workers == "all" else self.workers)
            for flag, value in zip(("--ray-address", "--gpus-per-worker", "--workers"), given, strict=True):
                if value is not None:
                    raise ConfigError(f"{flag} needs --engine ray")
            return
        parse_workers(self.workers)
        if self.gpus_per_worker not in (None, 0, 1):
            raise ConfigError(
                f"--gpus-per-worker {self.gpus_per_worker}: choose from 0, 1; --tensor-parallel N gives each "
                "worker N GPUs, among which its model is divided"
            )
        if self.ray_address is not None and "://" in self.ray_address:
            raise ConfigError(
                f"--ray-address {self.ray_address!r}: give HOST:PORT or auto, on a machine of the cluster"
            )


class KvSettings(Settings, panel=RUN):
    """Where keys and values are. `kv_memory` is in bytes."""

    kv_memory: int | None = option(
        None,
        metavar="BYTES",
        help="Keys and values on the device, e.g. 4GiB; sliminfer offloads what exceeds it to the host.",
        shown_default="no bound",
        kind=BYTES,
        least=1,
    )


class PackSettings(KvSettings, panel=RUN):
    """What is on the device at once. `pack_tokens` are tokens, `in_flight` rows."""

    pack_tokens: int | None = option(
        None,
        help="Prompt tokens a pack, e.g. 32k; 1 runs one document at a time, for clean TTFT.",
        shown_default="from free memory",
        kind=COUNT,
        least=1,
    )
    in_flight: int | None = option(
        None,
        metavar="N",
        help="Most rows that are decoded together; a kill loses no more than these.",
        shown_default="256 on a GPU, 16 on a CPU",
        least=1,
    )


class ResumeSettings(Settings, panel=RUN):
    """Going on with what was stopped."""

    resume: bool = option(False, help="Continue a run that was stopped; of batch, a published output too.")


class OverwriteSettings(Settings, panel=RUN):
    """Replacing what is there."""

    overwrite: bool = option(False, help="Replace an output that exists.")


class RunSettings(EngineSettings, PackSettings, ResumeSettings, OverwriteSettings, panel=RUN):
    """All that only a run has which writes answers. `row_timeout` is in seconds."""

    output: str = option(
        metavar="OUTPUT",
        help="A file, or an s3:// or gs:// URL: .parquet, .arrow, .arrows or .jsonl; - is JSON lines on "
        "stdout, as rows end.",
        in_environment=False,
        panel=None,
    )
    keep_columns: str | None = option(
        None,
        help="Columns to pass through, as name:type,name:type.",
        shown_default="all",
        may_be_empty=True,
        panel=READING,
    )
    columns: tuple[str, ...] | None = option(
        None,
        metavar="C[,C...]",
        help="Columns of answers in the output, beside those that --resume reads: answer, reasoning, ...; "
        "stats puts all statistics into one struct.",
        shown_default="all, each by itself",
        kind=WORDS,
        check=check_column,
    )
    guard: str = option(
        "auto",
        help="With --profile: auto (rows that it does not cover, by task, length or attention, run dense), "
        "off.",
        choices=("auto", "off"),
        panel=METHOD,
    )
    group: str = option(
        "auto",
        help="Rows about the same document: auto (together, what they share computed once, where that is "
        "cheaper), any (also by dense in place of the method), off.",
        choices=("auto", "any", "off"),
    )
    kv_dtype: str = option(
        "auto",
        help="Keys and values while answers are decoded: auto (as --dtype) or, on a GPU that can, fp8: half "
        "the memory, and half the time to read them.",
        choices=KV_DTYPES,
    )
    lookup: str = option(
        "off",
        metavar="auto|off|N",
        help="For answers that quote: draft up to N tokens (auto: 8, fewer where they are refused) from what "
        "followed the newest ones in the prompt, and verify them in one decode step.",
        kind=TEXT_OR_WHOLE,
        check=parse_lookup,
    )
    sort_by_document: bool = option(
        False, help="Read all rows first and put those about the same document together, on disk."
    )
    order: str = option(
        "input", help="Rows of the output: input (order) or completion.", choices=("input", "completion")
    )
    save_selection: bool = option(
        False, help="Store which tokens each layer kept, with the prompt's text, for report --row."
    )
    retry_errors: bool = option(False, help="With --resume: run rows that failed again.")
    drop_missing: bool = option(
        False,
        help="With --resume: let rows leave the output although a file of the last run is missing or empty, "
        "or none of its rows is left.",
    )
    max_errors: str | None = option(
        None,
        metavar="N|P%",
        help="Stop after more row errors than N, or than P% of the finished rows, earlier runs' included.",
        shown_default="no bound",
        kind=TEXT_OR_WHOLE,
        check=parse_max_errors,
    )
    deadline: str | None = option(
        None,
        metavar="8h|06:00|MOMENT",
        help="Stop after a time (8h, 90m), at the next such time of day, or at a date and time, with exit "
        "code 9; --resume continues.",
        shown_default="none",
        check=parse_deadline,
    )
    price_per_hour: float | None = option(
        None,
        metavar="PRICE",
        help="What an hour of all machines costs: the summary tells the run's cost, --dry-run an estimate.",
        least=0,
        most=1_000_000,
    )
    row_timeout: float | None = option(
        None,
        metavar="SECONDS",
        help="A row that takes longer is an error; the rest of its pack runs again.",
        shown_default="no bound",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to_stdout:
            self._refuse_on_stdout()
        if self.save_selection and self.format_name.lower().endswith(".jsonl"):
            raise ConfigError(f"--save-selection writes bytes, which {self.output} cannot hold: use .parquet")
        if self.resume and self.overwrite:
            raise ConfigError(
                "--resume and --overwrite exclude each other: one continues what the other drops"
            )
        if self.retry_errors and not self.resume:
            raise ConfigError(
                "--retry-errors needs --resume: it runs the failed rows of an earlier run again"
            )
        if self.drop_missing and not self.resume:
            raise ConfigError("--drop-missing needs --resume: it is about rows of an earlier run")
        if self.row_timeout is not None and not self.row_timeout > 0:
            raise ConfigError(f"--row-timeout {self.row_timeout}: must be a number of seconds above 0")

    @property
    def to_stdout(self) -> bool:
        """Whether answers are written to standard output, and no journal is kept of them."""
        return self.output == "-"

    @property
    def format_name(self) -> str:
        """The output, or a name in its place, whose extension says the format."""
        return "stdout.jsonl" if self.to_stdout else self.output

    def _refuse_on_stdout(self) -> None:
        for flag, is_given in (("--resume", self.resume), ("--overwrite", self.overwrite)):
            if is_given:
                raise ConfigError(f"{flag} needs a file as OUTPUT: standard output (-) keeps nothing")


class BatchConfig(
    DataSettings,
    SplitSettings,
    ModelSettings,
    ParallelSettings,
    MethodSettings,
    SamplingSettings,
    SeveralSettings,
    FormSettings,
    ValiditySettings,
    RunSettings,
    defaults={"max_new_tokens": None, "on_overlong": None},
):
    """The settings of `marsinfer batch`, named as its flags, whose --help explains them.

    `input` are files, globs, folders or URLs, `output` a file or a URL. What is asked is a `question`, that
    of a `question_column`, a summary (`summarise`), or what a `prompt_template` says; where none of them is
    given, the columns of the input decide, and until then `max_new_tokens` and `on_overlong` may be None, and
    `method` may be auto. Counts are tokens (`max_new_tokens`, `pack_tokens`) or rows (`limit`, `sample`),
    `kv_memory` is in bytes, `row_timeout` in seconds; `shard` is text such as 2/8, `max_errors` text such as
    20 or 5%, `deadline` text such as 8h, 06:00 or 2026-11-28T06:00; `price_per_hour` is in any currency.
    `settings` are the parameters of `method`, as numbers or as text.

    Raises ConfigError, which names the flag, for a setting that cannot work; imports nothing heavy.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine == "ray":
            self._check_devices()
        if self.tensor_parallel > 1:
            self._check_parallel()
        if self.method in IN_STEPS:
            self._check_alone()
        if not self.input:
            raise ConfigError("no input: give a file, a glob or a folder")
        if self.n > 1:
            self._check_several()
        elif ANSWERS in (self.columns or ()):
            raise ConfigError(f"--columns {ANSWERS} needs --n, for more than one answer to a prompt")
        self._check_form()
        if self.questions is not None and self.order == "completion":
            raise ConfigError(
                "--questions and --order completion exclude each other: a document's answers end one by one"
            )
        if self.expand and self.columns is not None and "answer" not in self.columns:
            raise ConfigError("--expand makes its column of the answers: --columns must have answer too")

    @property
    def step_columns(self) -> frozenset[str]:
        """The columns that an output has for what decode steps leave out."""
        return frozenset({SKIPPED_FFNS} if self.method in IN_STEPS else ())

    def _check_alone(self) -> None:
        """What a method in decode steps does not go with: a step of several rows reads all weights anyway."""
        if self.in_flight != 1:
            raise ConfigError(
                f"--method {self.method} leaves out parts of decode steps, which gains nothing where several "
                "rows are decoded together: give --in-flight 1"
            )
        refused = {
            f"--n {self.n}": self.n > 1,
            f"--lookup {self.lookup}": self.lookup != "off",
            "--group any": self.group == "any",
        }
        for flag, is_given in refused.items():
            if is_given:
                raise ConfigError(f"--method {self.method} and {flag} exclude each other")

    def _check_parallel(self) -> None:
        refused = {
            "--kv-memory": self.kv_memory is not None,
            "--trust-remote-code": self.trust_remote_code,
        }
        for flag, is_given in refused.items():
            if is_given:
                raise ConfigError(f"--tensor-parallel {self.tensor_parallel} and {flag} exclude each other")
        if self.method != AUTO:
            self.check_divided(self.method)

    def _check_several(self) -> None:
        if self.temperature < COLDEST:
            raise ConfigError(
                f"--n {self.n} needs a --temperature above 0: greedy answers to one prompt are all the same"
            )
        if self.on_overlong == "split":
            raise ConfigError(
                f"--n {self.n} and --on-overlong split exclude each other: a document that is answered in "
                "parts has one answer; choose skip, error or a truncation"
            )
        if self.retries:
            raise ConfigError(f"--n {self.n} and --retries exclude each other: a prompt has several answers")
        if self.kv_memory is not None:
            raise ConfigError(
                f"--n {self.n} and --kv-memory exclude each other: which keys and values are offloaded "
                "depends on the answer"
            )

    def _check_form(self) -> None:
        flag = self.form_flag
        if flag is None:
            return
        if self.stop:
            raise ConfigError(f"--stop and {flag} exclude each other: a form says itself where it ends")
        if parse_lookup(self.lookup):
            raise ConfigError(
                f"--lookup {self.lookup} and {flag} exclude each other: an answer in a form goes on token by "
                "token; --lookup auto does without drafts"
            )

    def _check_devices(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(
                f"--device {self.device!r}: Ray gives each worker its GPU; choose from auto, cpu, cuda"
            )
        if (self.device, self.gpus_per_worker) in (("cpu", 1), ("cuda", 0)):
            raise ConfigError(
                f"--device {self.device} and --gpus-per-worker {self.gpus_per_worker} exclude each other"
            )
