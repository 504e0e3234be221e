"""Whether a method is as accurate as dense, on the same rows: what `marsinfer check` runs."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.check.gates import (
    CheckResult,
    Pair,
    check_scorer,
    has_pruned,
    make_gates,
    refuse_too_few,
    speeds,
    verdict_of,
)
from pipeline.errors import GateInconclusive
from pipeline.interrupts import nothing_to_lose
from pipeline.pruning.capabilities import uses_fp8
from pipeline.pruning.registry import make_method
from pipeline.settings.check_settings import CheckConfig
from pipeline.settings.method_settings import AUTO
from pipeline.setup.intake import make_prompts
from pipeline.setup.provenance import PACKAGES, moment_of
from pipeline.summary import Tally
from pipeline.texts.versions import version_of
from pipeline.texts.words import counted

if TYPE_CHECKING:
    from pipeline.check.baseline import Baseline
    from pipeline.check.check_journal import CheckJournal
    from pipeline.evaluate.check_rows import CheckRow, CheckRows
    from pipeline.evaluate.row_results import RowResult
    from pipeline.model.loading import LoadedModel, Model
    from pipeline.prompts.builder import PromptBuilder
    from pipeline.pruning.base import PruningMethod


@dataclass(frozen=True, kw_only=True)
class _Check:
    """A check whose settings fit its model and data, of which no weights are loaded yet."""

    config: CheckConfig
    model: Model
    method: PruningMethod
    prompts: PromptBuilder
    rows: CheckRows
    note: Callable[[str], None]
    progress: Callable[[Tally], None]
    check: Callable[[], None]

    def dense_decides(self) -> dict[str, Any]:
        """The settings of which each can change a result of the dense side.

        Those that are seldom set are named only where they are, so that a file of a version that did not
        know them still fits.
        """
        config = self.config
        scaled = {} if self.model.rope_scaling is None else {"rope_scaling": self.model.rope_scaling}
        stops = {"stop": list(config.stop)} if config.stop else {}
        drawn = {"temperature": config.temperature, "top_p": config.top_p, "seed": config.seed}
        return {
            "model": {"fingerprint": self.model.fingerprint, "dtype": str(self.model.dtype), **scaled},
            "template_sha256": self.prompts.template_hash,
            **({} if (moment := moment_of(self.prompts)) is None else {"date": moment}),
            "max_new_tokens": config.max_new_tokens,
            "forced": "references" if config.has_references else "dense answers",
            "generate": config.generate,
            **stops,
            **({"sampling": drawn} if config.generate and config.temperature else {}),
        }

    def decides(self) -> dict[str, Any]:
        """The same of both sides."""
        return {
            **self.dense_decides(),
            "method": {"name": self.method.name, "settings": asdict(self.method)},
            "linear_dtype": self.config.linear_dtype,
            "attention_dtype": "auto",  # as in the settings that decide a run
        }


def _nothing(*_: Any) -> None:
    pass


def run_check(
    config: CheckConfig,
    *,
    model: Model | None = None,
    method: PruningMethod | None = None,
    progress: Callable[[Tally], None] = _nothing,
    note: Callable[[str], None] = _nothing,
    check: Callable[[], None] = _nothing,
) -> CheckResult:
    """Run dense and the method on the same rows and compare them; write the baseline and reports asked for.

    `model` and `method` stand for those that `config` names. `progress` is called after every row of a side,
    `note` with what a user should know, `check` before every row and between the steps of generated answers:
    it may raise to end the check. Raises MarsError; a method that is worse is no error but a verdict.
    """
    from pipeline.check.check_journal import CheckJournal, journal_path
    from pipeline.check.reports import refuse_foreign_files, write_reports

    refuse_foreign_files(config)
    run = _prepare(config, model, method, note, progress, check)
    file = config.result_file
    journal = None if file is None else CheckJournal(journal_path(file), run.decides(), resume=config.resume)
    with journal if journal is not None else nullcontext():
        if journal is not None and journal.damaged:
            note(f"{counted(journal.damaged, 'line')} of {journal.path} cannot be read: their rows run again")
        if journal is not None and journal.resumed:
            note(f"resuming: {journal.resumed:,} results are done")
        found = _run_sides(run, journal)
        result = _compare(run, found)
        _accept(run, found, result)
        write_reports(result)
        if journal is not None:
            journal.remove()
    return result


def _prepare(
    config: CheckConfig,
    model: Model | None,
    method: PruningMethod | None,
    note: Callable[[str], None],
    progress: Callable[[Tally], None],
    check: Callable[[], None],
) -> _Check:
    from pipeline.evaluate.check_rows import read_rows
    from pipeline.model.loading import open_model
    from pipeline.setup.auto import proven
    from pipeline.setup.profile import check_profile, load_profile

    if model is None:
        model = open_model(config)
    for text in model.notes:
        note(text)
    if method is None and config.method == AUTO:
        config = proven(config, model)
    method = make_method(config.method, config.settings) if method is None else method
    if config.profile is not None:
        profile = load_profile(config.profile)
        for text in check_profile(config.profile, profile, model):
            note(text)
        if not profile.is_of(config, method):
            note("other settings stand above the profile's: it is not the profile that is checked")
    method.plan(model.shape, (1,))  # settings that do not fit the model's depth
    if config.linear_dtype != "auto" or uses_fp8(method):
        model.check_fp8()
    prompts = _prompts(config, model)
    rows = read_rows(config, prompts)
    for text in rows.notes:
        note(text)
    check_scorer(config, rows.rows)
    for message in rows.left_out:
        note(f"left out: {message}")
    _refuse_dense(config, method)
    cost = refuse_too_few(config, rows.rows)
    if cost is not None:
        note(cost)
    return _Check(
        config=config,
        model=model,
        method=method,
        prompts=prompts,
        rows=rows,
        note=note,
        progress=progress,
        check=check,
    )


def _refuse_dense(config: CheckConfig, method: PruningMethod) -> None:
    """GateInconclusive where the method is dense itself, and no scores of an earlier run are there."""
    from pipeline.pruning.dense import Dense

    if method == Dense() and config.linear_dtype == "auto" and not _reuses(config):
        raise GateInconclusive(
            "nothing to compare: dense against itself; name a method with --method, or with --scope rows a "
            "--baseline of an earlier run"
        )


def _reuses(config: CheckConfig) -> bool:
    """Whether results are taken from the baseline."""
    return config.baseline is not None and Path(config.baseline).exists() and not config.overwrite_baseline


def _prompts(config: CheckConfig, model: Model) -> PromptBuilder:
    """The check's prompts, which print the date of the results that they are held against, if any."""
    from pipeline.check.baseline import baseline_settings
    from pipeline.check.check_journal import journal_path, journal_settings
    from pipeline.prompts.chat import parse_moment

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


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Results by id."""

    dense: Mapping[str, RowResult]
    method: Mapping[str, RowResult]
    baseline: Baseline | None  # that was there
    same_run: bool  # whether this run timed all of both

    @property
    def accepted(self) -> Mapping[str, RowResult]:
        """What the method is held against instead of dense, if anything."""
        return {} if self.baseline is None else self.baseline.accepted


def _run_sides(run: _Check, journal: CheckJournal | None) -> _Found:
    from pipeline.check.baseline import read_baseline, write_baseline

    rows = run.rows.rows
    tally = Tally()
    load = cache(partial(_load, run))
    path = None if run.config.baseline is None else Path(run.config.baseline)
    baseline = None
    dense: dict[str, RowResult] = {}
    if path is not None and _reuses(run.config):
        baseline = read_baseline(path, rows, run.dense_decides())
        dense = dict(baseline.dense)
        run.note(f"dense is taken from {path}, of {baseline.about.get('started')}")
    elif journal is not None:
        dense = journal.found("dense", rows)
    method = {} if journal is None else journal.found("method", rows)
    # what was forced may be dense's answer, which a newer baseline may have changed
    method = {
        id: result for id, result in method.items() if id in dense and result.answer == dense[id].answer
    }
    same_run = not (dense or method)
    tally.expected_rows = 2 * len(rows) - len(dense) - len(method)
    for name, found in (("dense", dense), ("method", method)):
        pending = [row for row in rows if row.sample.id not in found]
        if pending:
            _run_side(run, load(), name, pending, found, dense, journal, tally)
        if name == "dense" and path is not None and baseline is None:
            write_baseline(path, [dense[row.sample.id] for row in rows], (), run.dense_decides(), _about(run))
    return _Found(dense=dense, method=method, baseline=baseline, same_run=same_run)


def _accept(run: _Check, found: _Found, result: CheckResult) -> None:
    """Add what the method scored to a baseline that has nothing of the kind yet, if the check passed."""
    from pipeline.check.baseline import write_baseline

    lacks = found.baseline is None or (found.baseline.is_whole and not found.accepted)
    if run.config.baseline is None or result.verdict != "pass" or not lacks:
        return
    dense, method = ([side[row.sample.id] for row in run.rows.rows] for side in (found.dense, found.method))
    write_baseline(Path(run.config.baseline), dense, method, run.dense_decides(), _about(run))
    if run.config.scope == "rows":
        run.note(f"what the method scored is what later runs are held against, in {run.config.baseline}")


def _run_side(
    run: _Check,
    model: LoadedModel,
    name: str,
    pending: Sequence[CheckRow],
    found: dict[str, RowResult],
    dense: Mapping[str, RowResult],
    journal: CheckJournal | None,
    tally: Tally,
) -> None:
    """Add a result to `found` for each of the rows that are pending."""
    from pipeline.engines.answering import rules_of, sampling_of
    from pipeline.evaluate.row_results import Side

    side = Side(
        model=model,
        variant=_variants(run)[name],
        rules=rules_of(run.config, model),
        generates=run.config.generate,
        sampling=sampling_of(run.config),
        check=run.check,
    )
    for result in side.run(pending, None if name == "dense" else dense):
        if journal is not None:
            journal.add(name, result)
        found[result.id] = result
        tally.count("ok", prompt_tokens=result.score.prompt_tokens)
        run.progress(tally)


def _load(run: _Check) -> LoadedModel:
    from pipeline.model.variant import prepare

    run.check()
    with nothing_to_lose():
        model = run.model.load()
    prepare(model, _variants(run).values())
    return model


def _variants(run: _Check) -> dict[str, Any]:
    """Each side: dense in the model's own precision, the method as it is asked for."""
    from pipeline.model.variant import Variant
    from pipeline.pruning.dense import Dense

    return {
        "dense": Variant("dense", Dense()),
        "method": Variant(
            run.method.name,
            run.method,
            linears=run.config.linear_dtype,
        ),
    }


def _compare(run: _Check, found: _Found) -> CheckResult:
    config, rows = run.config, run.rows.rows
    accepted = found.accepted if config.scope == "rows" else {}
    pairs = tuple(
        Pair(
            row=row,
            dense=found.dense[row.sample.id],
            method=found.method[row.sample.id],
            accepted=accepted.get(row.sample.id),
        )
        for row in rows
    )
    pruned = has_pruned(config, pairs, ffn_in_fp8=uses_fp8(run.method))
    gates = make_gates(config, pairs, pruned=pruned or bool(accepted and run.method.name == "dense"))
    cut = [row.document.truncated_tokens for row in rows]
    return CheckResult(
        config=config,
        verdict=verdict_of(gates),
        gates=gates,
        against="accepted" if accepted else "dense",
        speed=speeds(pairs, same_run=found.same_run),
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
        about=_about(run),
        pairs=pairs,
    )


def _about(run: _Check) -> dict[str, Any]:
    return {
        **run.decides(),
        "data_sha256": run.rows.data_hash,
        "name": run.model.name,
        "device": run.model.device_name(),
        "attention": run.model.attention.name,
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
