"""Whether a method is as accurate as dense, on the same rows: what `marsinfer check` runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.checks.baseline import Baseline, baseline_settings, read_baseline, write_baseline
from pipeline.checks.check_journal import CheckJournal, journal_path, journal_settings
from pipeline.checks.gates import (
    CheckResult,
    Pair,
    check_scorer,
    make_gates,
    refuse_too_few,
    speeds,
)
from pipeline.checks.reports import no_older_reports, refuse_foreign_files, write_reports
from pipeline.errors import GateInconclusive, ending
from pipeline.evaluate.check_rows import CheckRows, read_rows
from pipeline.evaluate.drops import worst
from pipeline.evaluate.row_results import RowResult, Side
from pipeline.evaluate.workbench import DENSE, Workbench
from pipeline.families.exit_maps import check_exit_maps
from pipeline.interrupts import nothing_to_lose
from pipeline.model.loading import Model, open_model
from pipeline.model.variant import Variant, check_draft, prepare
from pipeline.notebooks import listeners
from pipeline.prompts.builder import PromptBuilder
from pipeline.prompts.chat import parse_moment
from pipeline.pruning.base import PruningMethod
from pipeline.pruning.capabilities import uses_fp8
from pipeline.pruning.registry import make_method, told
from pipeline.records import Reasoning
from pipeline.settings.check_settings import CheckConfig
from pipeline.settings.keywords import StrPath, called_with, inputs_of
from pipeline.settings.method_settings import AUTO
from pipeline.settings.model_settings import WeightsSettings
from pipeline.setup.auto import proven
from pipeline.setup.intake import make_prompts
from pipeline.setup.objects import with_objects
from pipeline.setup.preparation import moment_of
from pipeline.setup.profile import check_profile, load_profile
from pipeline.tally import Tally
from pipeline.texts.versions import timestamp, versions
from pipeline.texts.words import counted


@dataclass(frozen=True)
class _Check:
    """A check whose settings fit its model and data, of which no weights are loaded yet."""

    config: CheckConfig
    model: Model
    method: PruningMethod
    exit_maps: str | None  # the digest of those that the method names
    prompts: PromptBuilder
    rows: CheckRows
    note: Callable[[str], None]
    progress: Callable[[Tally], None]
    check: Callable[[], None]

    @property
    def variants(self) -> dict[str, Variant]:
        """Each side: dense in the model's own precision, the method as it is asked for."""
        method = Variant(self.method.name, self.method, linears=self.config.linear_dtype)
        return {"dense": DENSE, "method": method}

    @cached_property
    def bench(self) -> Workbench:
        """The model, loaded when a row has to be run."""
        self.check()
        with nothing_to_lose():
            model = self.model.load()
        prepare(model, self.variants.values())
        return Workbench(model=model, check=self.check)

    def dense_decides(self) -> dict[str, Any]:
        """The settings of which each can change a result of the dense side.

        Those that are seldom set are named only where they are, so that a file of a version that did not
        know them still fits.
        """
        config = self.config
        scaled = {} if self.model.rope_scaling is None else {"rope_scaling": self.model.rope_scaling}
        stops = {"stop": list(config.stop)} if config.stop else {}
        chooses = config.temperature or config.repetition_penalty != 1
        return {
            "model": {"fingerprint": self.model.fingerprint, "dtype": str(self.model.dtype), **scaled},
            "template_sha256": self.prompts.template_hash,
            **({"template_args": config.template_args} if config.template_arg else {}),
            **({} if (moment := moment_of(self.prompts)) is None else {"date": moment}),
            "max_new_tokens": config.max_new_tokens,
            "forced": "references" if config.has_references else "dense answers",
            "generate": config.generate,
            **stops,
            **({"reasoning": "apart"} if config.generate and self._may_reason else {}),
            **({"sampling": config.sampling_that_decides} if config.generate and chooses else {}),
        }

    @property
    def _may_reason(self) -> bool:
        return self.prompts.reasoning is not Reasoning.UNEXPECTED

    def decides(self) -> dict[str, Any]:
        """The same of both sides."""
        return {
            **self.dense_decides(),
            "method": told(self.method),
            **({} if self.exit_maps is None else {"exit_maps": self.exit_maps}),
            **({} if self.model.draft is None else {"draft": self.model.draft.fingerprint}),
            "linear_dtype": self.config.linear_dtype,
            "attention_dtype": "auto",  # as in the settings that decide a run
        }

    def about(self) -> dict[str, Any]:
        return {
            **self.decides(),
            "data_sha256": self.rows.data_hash,
            "name": self.model.name,
            "device": self.model.device_name(),
            "attention": self.model.attention.name,
            "versions": versions(),
            "started": timestamp(),
        }

    def write_baseline(self, dense: Sequence[RowResult], accepted: Sequence[RowResult]) -> None:
        assert self.config.baseline is not None
        write_baseline(Path(self.config.baseline), dense, accepted, self.dense_decides(), self.about())


def check(
    input: StrPath | Sequence[StrPath] = (),
    *,
    model: StrPath | Model = WeightsSettings.model,
    method: str | PruningMethod | None = None,
    progress: Callable[[Tally], None] | None = None,
    note: Callable[[str], None] = lambda text: None,
    check: Callable[[], None] = lambda: None,
    **options: Any,
) -> CheckResult:
    """Hold a method against dense on the same rows; what `marsinfer check` runs.

    `input` is a file, glob, folder or URL, or several; `model` a name or a model that `load_model` returned,
    `method` a name or a method object. `options` are the other fields of `CheckConfig`, which are the
    command's flags; without `out` nothing is written. `progress` is called after every row of a side
    (without it, a notebook shows a bar), `note` with what a user should know, `check` between rows: it may
    raise to end the check.

    Returns the result, whose `verdict` is pass, fail or inconclusive: a method that is worse raises nothing.
    Raises ConfigError, InputError or ModelError before any row is run, and GateInconclusive where so few
    rows cannot pass.
    """
    progress, _ = listeners(progress, None)
    options = called_with("check", CheckConfig, options, note) | {"input": inputs_of(input)}
    return run_check(
        CheckConfig(**with_objects(options, model, method)),
        model=None if isinstance(model, str | os.PathLike) else model,
        method=None if isinstance(method, str) else method,
        progress=ending(progress),
        note=ending(note),
        check=ending(check),
    )


def run_check(
    config: CheckConfig,
    *,
    model: Model | None = None,
    method: PruningMethod | None = None,
    progress: Callable[[Tally], None] = lambda tally: None,
    note: Callable[[str], None] = lambda text: None,
    check: Callable[[], None] = lambda: None,
) -> CheckResult:
    """Run dense and the method on the same rows and compare them; write the baseline and reports asked for.

    `model` and `method` stand for those that `config` names. `progress` is called after every row of a side,
    `note` with what a user should know, `check` before every row and between the steps of generated answers:
    it may raise to end the check. Raises MarsError; a method that is worse is no error but a verdict.
    """
    refuse_foreign_files(config)
    with no_older_reports(config):
        return _check(config, model, method, progress, note, check)


def _check(
    config: CheckConfig,
    model: Model | None,
    method: PruningMethod | None,
    progress: Callable[[Tally], None],
    note: Callable[[str], None],
    check: Callable[[], None],
) -> CheckResult:
    if model is None:
        model = open_model(config)
    for text in model.notes:
        note(text)
    if method is None and config.method == AUTO:
        config = proven(config, model)
    method = make_method(config.method, config.settings) if method is None else method
    exit_maps = _check_method(config, model, method, note)
    prompts = _prompts(config, model)
    rows = _read(config, method, prompts, note)
    run = _Check(config, model, method, exit_maps, prompts, rows, note, progress, check)
    file = config.result_file
    journal = None if file is None else CheckJournal(journal_path(file), run.decides(), resume=config.resume)
    with model.in_use(), nullcontext() if journal is None else closing(journal):
        if journal is not None and journal.damaged:
            note(f"{counted(journal.damaged, 'line')} of {journal.path} cannot be read: their rows run again")
        if journal is not None and journal.resumed:
            note(f"resuming: {journal.resumed:,} results are done")
        pairs, baseline, same_run = _run_sides(run, journal)
        result = _compare(run, pairs, same_run=same_run)
        _accept(run, baseline, result)
        write_reports(result)
        if journal is not None:
            journal.remove()
    return result


def _check_method(
    config: CheckConfig, model: Model, method: PruningMethod, note: Callable[[str], None]
) -> str | None:
    """The digest of the method's exit maps. Raises MarsError for settings that do not fit the model."""
    if config.profile is not None:
        profile = load_profile(config.profile)
        for text in check_profile(config.profile, profile, model):
            note(text)
        if not profile.is_of(config, method):
            note("other settings stand above the profile's: it is not the profile that is checked")
    method.plan(model.shape, (1,))  # settings that do not fit the model's depth
    check_draft(model, [method])
    if config.linear_dtype != "auto" or uses_fp8(method):
        model.check_fp8()
    return check_exit_maps(method, model.shape, model.fingerprint)


def _read(
    config: CheckConfig, method: PruningMethod, prompts: PromptBuilder, note: Callable[[str], None]
) -> CheckRows:
    """The rows to check. Raises GateInconclusive where no check of them could pass."""
    rows = read_rows(config, prompts)
    for text in rows.told:
        note(text)
    check_scorer(config, rows.rows)
    _refuse_dense(config, method)
    cost = refuse_too_few(config, rows.rows)
    if cost is not None:
        note(cost)
    return rows


def _refuse_dense(config: CheckConfig, method: PruningMethod) -> None:
    """GateInconclusive where the method is dense itself, and no scores of an earlier run are there."""
    if method == DENSE.method and config.linear_dtype == "auto" and not _reuses(config):
        raise GateInconclusive(
            "nothing to compare: dense against itself; name a method with --method, or with --scope rows a "
            "--baseline of an earlier run"
        )


def _reuses(config: CheckConfig) -> bool:
    """Whether results are taken from the baseline."""
    return config.baseline is not None and Path(config.baseline).exists() and not config.overwrite_baseline


def _prompts(config: CheckConfig, model: Model) -> PromptBuilder:
    """The check's prompts, which print the date of the results that they are held against, if any."""
    prompts = make_prompts(config, model, config.max_new_tokens)
    if moment_of(prompts) is None:
        return prompts
    begun: dict[str, Any] = {}
    if config.baseline is not None and not config.overwrite_baseline:
        begun |= baseline_settings(Path(config.baseline))
    if config.resume and config.result_file is not None:
        begun |= journal_settings(journal_path(config.result_file))
    if begun.get("date") is None:
        return prompts
    return make_prompts(config, model, config.max_new_tokens, now=parse_moment(begun["date"]))


def _run_sides(run: _Check, journal: CheckJournal | None) -> tuple[tuple[Pair, ...], Baseline | None, bool]:
    """Every row under both sides, the baseline that was there, and whether this run timed all of both."""
    rows, config = run.rows.rows, run.config
    ids = [row.sample.id for row in rows]
    baseline, dense, method = _known(run, journal)
    same_run = not (dense or method)
    tally = Tally()
    tally.expected_rows = 2 * len(rows) - len(dense) - len(method)
    for name, found in (("dense", dense), ("method", method)):
        pending = [row for row in rows if row.sample.id not in found]
        if pending:
            side = Side(bench=run.bench, variant=run.variants[name], config=config)
            for result in side.run(pending, None if name == "dense" else dense):
                if journal is not None:
                    journal.add(name, result)
                found[result.id] = result
                tally.count("ok", prompt_tokens=result.score.prompt_tokens)
                run.progress(tally)
        if name == "dense" and config.baseline is not None and baseline is None:
            run.write_baseline(dense=[dense[id] for id in ids], accepted=())
    accepted = baseline.accepted if baseline is not None and config.scope == "rows" else {}
    pairs = tuple(
        Pair(row=row, dense=dense[id], method=method[id], accepted=accepted.get(id))
        for id, row in zip(ids, rows, strict=True)
    )
    return pairs, baseline, same_run


def _known(
    run: _Check, journal: CheckJournal | None
) -> tuple[Baseline | None, dict[str, RowResult], dict[str, RowResult]]:
    """The baseline, if it is to be taken, and the results of both sides that need no run, by id."""
    rows, baseline = run.rows.rows, None
    dense, method = ({} if journal is None else journal.found(name, rows) for name in run.variants)
    if run.config.baseline is not None and _reuses(run.config):
        baseline = read_baseline(Path(run.config.baseline), rows, run.dense_decides())
        dense = dict(baseline.dense)
        run.note(f"dense is taken from {run.config.baseline}, of {baseline.about.get('started')}")
    # what was forced may be dense's answer, which a newer baseline may have changed
    same = {id for id, result in method.items() if id in dense and result.answer == dense[id].answer}
    return baseline, dense, {id: method[id] for id in same}


def _accept(run: _Check, baseline: Baseline | None, result: CheckResult) -> None:
    """Add what the method scored to a baseline that has nothing of the kind yet, if the check passed."""
    lacks = baseline is None or (baseline.is_whole and not baseline.accepted)
    if run.config.baseline is None or result.verdict != "pass" or not lacks:
        return
    pairs = result.pairs
    run.write_baseline(dense=[pair.dense for pair in pairs], accepted=[pair.method for pair in pairs])
    if run.config.scope == "rows":
        run.note(f"what the method scored is what later runs are held against, in {run.config.baseline}")


def _compare(run: _Check, pairs: tuple[Pair, ...], *, same_run: bool) -> CheckResult:
    config, rows = run.config, run.rows.rows
    accepted = pairs[0].accepted is not None  # of every row, or of none
    in_fp8 = config.linear_dtype != "auto" or uses_fp8(run.method)
    gates = make_gates(config, pairs, differs=in_fp8 or (accepted and run.method.name == "dense"))
    cut = [row.document.truncated_tokens for row in rows]
    return CheckResult(
        config=config,
        verdict=worst(gate.verdict for gate in gates if gate.decides),
        gates=gates,
        against="accepted" if accepted else "dense",
        speed=speeds(pairs, same_run=same_run),
        counts={
            "rows": len(rows),
            "documents": len({row.sample.document_key for row in rows}),
            "left_out": len(run.rows.left_out),
            "truncated_rows": sum(tokens > 0 for tokens in cut),
            "truncated_tokens": sum(cut),
            "references_cut": sum(row.reference_cut > 0 for row in rows),
            "forced_tokens": sum(pair.dense.score.tokens for pair in pairs),
        },
        left_out=run.rows.left_out,
        about=run.about(),
        pairs=pairs,
    )
