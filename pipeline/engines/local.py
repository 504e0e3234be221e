"""Answers packs of documents in this process, on one device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from pipeline.bench.flops import (
    attention_ratio,
    dense_flops,
    ffn_ratio,
    fp8_tokens,
    kept_ratio,
    layer_tokens,
    passes_flops,
)
from pipeline.engines.group_packs import GroupPacker
from pipeline.engines.grouped import Shared, answer_groups, rehearse_group
from pipeline.engines.keeping import keep_selection
from pipeline.engines.memory import Packer
from pipeline.errors import MarsError, RowError, is_failure
from pipeline.grouping import Group, Way
from pipeline.model.decode import Generated, StopRules, decode
from pipeline.model.graphs import FEWEST_STEPS, WARM_UP_STEPS
from pipeline.model.loading import LoadedModel
from pipeline.model.prefill import Pack, Prefilled, prefill
from pipeline.model.sampling import Sampler, Sampling
from pipeline.pruning.base import PruningMethod
from pipeline.records import Answer, Answered, EncodedDocument, Row, Spans
from pipeline.summary import EngineTimes

# of the longer of the two documents that warm up: kernels are chosen by size, and some load when first chosen
WARM_UP_TOKENS = {"cpu": 64, "cuda": 4096}
SHORT_WARM_UP_TOKENS = 64
# of an answer that is long enough for its steps to be captured as a CUDA graph, and replayed a few times
WARM_UP_NEW_TOKENS = {"cpu": 2, "cuda": 1 + WARM_UP_STEPS + FEWEST_STEPS + 3}
LONGEST_WARM_UP_S = 60.0

T = TypeVar("T")


class Failure(NamedTuple):
    """Why rows could not be answered, as their columns `error_type` and `error_message` say it."""

    kind: str
    message: str


class LocalEngine:
    """One loaded model with one method: documents in, answers out, failures as rows."""

    def __init__(
        self,
        model: LoadedModel,
        method: PruningMethod,
        *,
        rules: StopRules,
        sampling: Sampling,
        pack_tokens: int | None = None,
        row_timeout: float | None = None,
        kv_memory: int | None = None,
        group: bool = False,
        save_selection: bool = False,
        check: Callable[[], None] = lambda: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """With `group`, rows about the same document are answered together where that is cheaper."""
        self.model, self.method, self.rules, self.sampling = model, method, rules, sampling
        self.row_timeout, self.check, self.note = row_timeout, check, note
        self.save_selection = save_selection
        self.times = EngineTimes()
        shape, self.itemsize = model.adapter.shape, model.adapter.dtype.itemsize
        self.packer = Packer.on(
            model.device,
            method,
            shape,
            itemsize=self.itemsize,
            new_tokens=rules.max_new_tokens,
            pack_tokens=pack_tokens,
            kv_memory=kv_memory,
        )
        self._noted: set[Way] = set()
        self._groups = group

    def beside(self, method: PruningMethod) -> LocalEngine:
        """An engine of the same model and settings, and the same account of times, with another method."""
        engine = copy(self)
        engine.method = method
        engine.packer = replace(self.packer, method=method, kv_memory=None)
        return engine

    @property
    def group_packer(self) -> GroupPacker:
        return GroupPacker(packer=self.packer)

    def warm_up(self, limit_s: float) -> bool:
        """Load kernels and libraries with throw-away documents, so that no row's TTFT pays for it.

        A short document, then, on a GPU, one of the length of a usual pack, whose decode steps are captured.
        Whether all ran: after `limit_s` seconds the warm-up is given up, between two layers.
        """
        started = time.perf_counter()

        def check() -> None:
            self.check()
            if time.perf_counter() - started > limit_s:
                raise RowError("timeout", f"the warm-up took longer than {limit_s:g} s")

        kind = self.model.device.type
        new_tokens = min(self.rules.max_new_tokens, WARM_UP_NEW_TOKENS[kind])
        room = self.model.adapter.shape.context - new_tokens
        # packs of one token mean one document at a time, of whatever length
        usual = self.packer.pack_tokens if self.packer.pack_tokens > 1 else WARM_UP_TOKENS[kind]
        short = min(room, SHORT_WARM_UP_TOKENS)
        longest = max(short, min(room, usual, WARM_UP_TOKENS[kind]))
        # whatever the answers say, they go on: an early stop would leave nothing to capture
        rules = StopRules(max_new_tokens=new_tokens)
        ran = True
        for length in sorted({short, longest}):
            # not under the row's time limit: loading kernels takes as long as it takes
            ran = ran and self._rehearse(length, rules, check)
        self.times = EngineTimes(warm_up_s=self.now() - started)
        return ran

    def _rehearse(self, length: int, rules: StopRules, check: Callable[[], None]) -> bool:
        """Answer a document of so many tokens; False where there was no time for it."""
        ids = np.arange(length, dtype=np.int64) % self.model.adapter.shape.vocab
        spans = Spans(document=(0, length), question=(length, length))
        document = EncodedDocument(source=Row(row=0, id="", place=""), input_ids=ids, spans=spans)
        try:
            self._answer([document], rules, check)
            if self._groups and self.model.device.type == "cuda":
                rehearse_group(self, ids, check)
        except RowError as error:  # where even this exceeds --kv-memory, say, the rows will say so
            return error.kind != "timeout"
        except torch.OutOfMemoryError:  # likewise
            pass
        else:
            return True
        self._free()  # outside the handler, whose traceback keeps the failed pack's tensors alive
        return True

    def answers(self, documents: Sequence[EncodedDocument]) -> Iterator[Answered]:
        """Answers to all documents of a window, a pack or a part of one at a time, in no order."""
        groups, alone = self.group_packer.split(documents) if self._groups else ([], documents)
        for pack in self.packer.packs(alone):
            yield Answered(pack, self.answer(pack))
        for group in groups:
            self._note_way(group)
        for group_pack in self.group_packer.packs(groups):
            yield from answer_groups(self, group_pack)

    def answer(self, pack: Sequence[EncodedDocument]) -> list[Answer]:
        """Answers in the pack's order. A pack that fails is halved until the culprit stands alone."""
        if len(pack) == 1 and self.model.device.type == "cpu":
            needed = self.packer.planned_bytes([pack[0].prompt_tokens])
            if needed > self.packer.max_bytes:  # the system would kill the process, with no error to catch
                return [self.failed(pack[0], Failure("out_of_memory", self._memory_message(pack[0])))]
        run = partial(self._answer, pack, self.rules)
        answers = self.attempt(run, pack[0])
        if isinstance(answers, list):
            return answers
        if len(pack) == 1:
            # a second time, in memory that the larger packs before it no longer hold in pieces
            again = self.attempt(run, pack[0]) if answers.kind == "out_of_memory" else answers
            return again if isinstance(again, list) else [self.failed(pack[0], answers)]
        half = len(pack) // 2
        return [*self.answer(pack[:half]), *self.answer(pack[half:])]

    def attempt(
        self, run: Callable[[Callable[[], None]], T], document: EncodedDocument, taken_s: float = 0.0
    ) -> T | Failure:
        """What `run` makes, given the check between its steps; or what went wrong, with the memory freed.

        `document` is the one that messages name; `taken_s` counts as time that its row has taken before.
        """
        try:
            return run(partial(self._check, time.perf_counter() - taken_s))
        except MarsError:
            raise
        except BaseException as error:  # whatever one row does, the others get their answers
            if not is_failure(error):
                raise
            failure = self._describe(error, document)
        self._free()  # outside the handler, whose traceback keeps the failed pack's tensors alive
        return failure

    def _free(self) -> None:
        """Give back the memory of a pack that failed."""
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _answer(
        self, documents: Sequence[EncodedDocument], rules: StopRules, check: Callable[[], None]
    ) -> list[Answer]:
        adapter, attention = self.model.adapter, self.model.attention
        started = self.now()
        pack = Pack.of(documents, self.model.device)
        limits = self.packer.limits
        prefilled = prefill(
            adapter,
            attention,
            self.method,
            pack,
            rules.max_new_tokens,
            check,
            limits,
            marks=self.save_selection,
        )
        return self.generate(documents, prefilled, started, rules, check)

    def generate(
        self,
        documents: Sequence[EncodedDocument],
        prefilled: Prefilled,
        started: float,
        rules: StopRules,
        check: Callable[[], None],
        shared: Shared | None = None,
    ) -> list[Answer]:
        """Answers to prompts whose prefill was `started` and is queued, behind what is `shared`."""
        shared_ms = 0.0 if shared is None else shared.ms
        prefill_ms = (self.now() - started) * 1e3 + shared_ms
        sampler = Sampler(self.sampling, [document.source.draw_number for document in documents])
        first_tokens = sampler.draw(prefilled.logits_BV, range(len(documents)))
        first_at = self.now()
        rows = self._statistics(documents, prefilled)
        adapter, attention = self.model.adapter, self.model.attention
        generated = decode(adapter, attention, prefilled, first_tokens, sampler, rules, check)
        for row, document, tokens in zip(rows, documents, generated, strict=True):
            row.queue_ms = (started - document.ready_at) * 1e3 - shared_ms
            row.prefill_ms = prefill_ms
            row.ttft_ms = (first_at - started) * 1e3 + shared_ms
            row.decode_ms = (tokens.finished_at - first_at) * 1e3
            row.pack_documents, row.pack_tokens = len(documents), sum(prefilled.lengths)
            row.kv_host_bytes, row.kv_swapped_bytes = prefilled.cache.traffic()
            self._finish(row, tokens)
        if shared is not None:
            self._tell_shared(rows, shared)
        elif self.save_selection:
            keep_selection(rows, documents, prefilled, self.model)
        self.times.add(started, first_at, max(tokens.finished_at for tokens in generated))
        return rows

    def _statistics(self, documents: Sequence[EncodedDocument], prefilled: Prefilled) -> list[Answer]:
        shape = self.model.adapter.shape
        stored = prefilled.cache.prompt_tokens()
        rows = []
        for b, (document, passes) in enumerate(zip(documents, prefilled.by_document(), strict=True)):
            row = self._row(document)
            row.kept_tokens, row.ffn_tokens = layer_tokens(passes)
            row.ffn_fp8_tokens = fp8_tokens(passes, everywhere=self.model.adapter.linears_in_fp8)
            row.kept_ratio = kept_ratio(shape, passes, document.prompt_tokens)
            row.ffn_ratio = ffn_ratio(shape, passes, document.prompt_tokens)
            row.attention_ratio = attention_ratio(shape, passes, document.prompt_tokens)
            row.flops_ratio = passes_flops(shape, passes) / dense_flops(shape, document.prompt_tokens)
            row.kv_bytes = sum(layer[b] for layer in stored) * shape.kv_bytes_per_token(self.itemsize)
            rows.append(row)
        return rows

    def _tell_shared(self, rows: Sequence[Answer], shared: Shared) -> None:
        """Say what rows share; of its operations each counts an equal part as its own."""
        shape = self.model.adapter.shape
        for row, flops, count in zip(rows, shared.flops, shared.group_rows, strict=True):
            row.method, row.shared_ms, row.group_rows = shared.method, shared.ms, count
            row.pack_tokens = shared.pack_tokens
            assert row.flops_ratio is not None
            assert row.prompt_tokens is not None
            row.flops_ratio -= flops * (1 - 1 / count) / dense_flops(shape, row.prompt_tokens)

    def _note_way(self, group: Group) -> None:
        """Say once how rows are answered together, and why in this way."""
        if group.way not in self._noted:
            self._noted.add(group.way)
            self.note(f"rows about the same document are answered together (--group auto); {group.reason}")

    def _row(self, document: EncodedDocument) -> Answer:
        row = Answer.begin(document.source, self.method.name)
        row.document_tokens, row.prompt_tokens = document.document_tokens, document.prompt_tokens
        row.truncated_tokens, row.tokenize_ms = document.truncated_tokens, document.tokenize_ms
        return row

    def _finish(self, row: Answer, generated: Generated) -> None:
        text = self.model.tokenizer.decode(generated.tokens, skip_special_tokens=True)
        found = [text.index(stop) for stop in self.rules.texts if stop in text]
        row.answer = text[: min(found)] if found else text
        row.new_tokens = len(generated.tokens)
        row.finish_reason = "stop" if generated.finish_reason == "stop_text" else generated.finish_reason

    def failed(self, document: EncodedDocument, failure: Failure) -> Answer:
        """The error row of a document."""
        row = self._row(document)
        row.status, (row.error_type, row.error_message) = "error", failure
        return row

    def _describe(self, error: BaseException, document: EncodedDocument) -> Failure:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return Failure("out_of_memory", self._memory_message(document))
        if isinstance(error, RowError):
            return Failure(error.kind, f"{document.source.place}: {error}")
        return Failure("internal", f"{document.source.place}: {type(error).__name__}: {error}")

    def _memory_message(self, document: EncodedDocument) -> str:
        needed = self.packer.planned_bytes([document.prompt_tokens])
        return (
            f"{document.source.place}: {document.prompt_tokens} tokens need about {needed / 1e9:.1f} GB on "
            f"{self.model.device} and {self.packer.max_bytes / 1e9:.1f} GB are usable; "
            "--on-overlong does not help here: shorten the document, or use a smaller --dtype or model"
        )

    def _check(self, started: float) -> None:
        """Called between layers and steps: give up a pack that takes longer than one row may."""
        self.check()
        if self.row_timeout is not None and time.perf_counter() - started > self.row_timeout:
            raise RowError("timeout", f"not answered within --row-timeout {self.row_timeout:g} s")

    def now(self) -> float:
        """Seconds, after all work on the device has ended."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()
