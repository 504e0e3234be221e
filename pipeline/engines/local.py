"""Answers documents in this process, on one device: prefilled in packs, and decoded as one batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from pipeline.checkpoints.device_memory import NO_REMEDIES, Remedies
from pipeline.engines.answering import add_answers, failed, lookup_of
from pipeline.engines.attempts import Attempts, Check
from pipeline.engines.clock import DecodeClock, EngineTimes
from pipeline.engines.group_packs import GroupPack
from pipeline.engines.grouped import Prefix
from pipeline.engines.jobs import Job, JobPacker
from pipeline.engines.memory import Packer, least_free_bytes, memory_message
from pipeline.engines.prefilling import Prefiller
from pipeline.engines.row_rules import RowRules
from pipeline.engines.scheduler import Room, Scheduler
from pipeline.engines.table import Running, RunningRow, Table, begun, decoded_alone
from pipeline.generation.decode import NOT_FINITE_MESSAGE
from pipeline.generation.draft_steps import held_bytes, with_steps
from pipeline.generation.generated import Generated, StopRules
from pipeline.generation.graphs import DecodeStats
from pipeline.generation.lookup import drafts_of
from pipeline.generation.sampling import Sampling
from pipeline.kernels.fused import FP8
from pipeline.model.loading import LoadedModel
from pipeline.pruning.base import PruningMethod
from pipeline.pruning.capabilities import step_skips
from pipeline.records import Answer, Answered, EncodedDocument, ResponseFormat, RowError
from pipeline.setup.guard import Guard

# tokens of a part of a pack that use a device well: fewer wait until more rows have left
WORTHWHILE_TOKENS = {"cpu": 1, "cuda": 8192}
FEWEST_PIECE_TOKENS = 1024  # of the pieces of a prefill, which become smaller where memory runs out


class LocalEngine:
    """One loaded model with one method: documents in, answers out, failures as rows.

    `add` documents, and call `advance` while the engine `is_busy`. Rows come and go one by one: each leaves
    when its answer ends, and others take its place.
    """

    def __init__(
        self,
        model: LoadedModel,
        method: PruningMethod,
        *,
        rules: StopRules,
        sampling: Sampling,
        response_format: ResponseFormat | None = None,
        logprobs: bool = False,
        pack_tokens: int | None = None,
        row_timeout: float | None = None,
        kv_memory: int | None = None,
        kv_dtype: str = "auto",
        lookup: int | None = 0,
        in_flight: int | None = None,
        n: int = 1,
        group: str = "off",
        guard: Guard | None = None,
        save_selection: bool = False,
        remedies: Remedies = NO_REMEDIES,
        check: Check = lambda: None,
        note: Callable[[str], None] = lambda text: None,
        phase: Callable[[str], None] = lambda text: None,
    ) -> None:
        """With `group` auto, rows about the same document are answered together where that is cheaper.

        With any, dense may take the method's place there; it answers what `guard` does not speak for. With
        `lookup` so many tokens of a row are drafted for a step, with None as many as suit the device.
        `in_flight` bounds the rows decoded at once, and `n` is how many answers a prompt gets, each of which
        counts as one there. `check` is called often, between layers too; what it raises ends the run.
        """
        of_run = RowRules.of_model(model, rules, sampling, response_format, logprobs=logprobs, n=n)
        self.row_rules = replace(of_run, skips=step_skips(method, model.shape))
        self.model, self._note = model, note
        self.kv_dtype = FP8 if kv_dtype == "fp8" else model.decoder.dtype
        self.lookup = lookup_of(lookup, sampling, model)
        packer = Packer.on(
            model.device,
            method,
            model.own,
            itemsize=model.decoder.dtype.itemsize,
            new_tokens=rules.max_new_tokens,
            drafts=drafts_of(self.lookup),
            n=n,
            pack_tokens=pack_tokens,
            kv_memory=kv_memory,
            kv_itemsize=self.kv_dtype.itemsize,
            in_flight=in_flight,
            free=least_free_bytes(model.decoder),
            cuts_queries=model.attention.cuts_queries(model.device),
            draft=None if model.draft is None else model.draft.shape,
            remedies=remedies,
        )
        packs = self.packs = JobPacker(packer=packer, group=group, guard=guard, note=note)
        self.attempts = Attempts(decoder=model.decoder, packs=packs, check=check, row_timeout=row_timeout)
        self.times, self.stats, self._clock = EngineTimes(), DecodeStats(), DecodeClock()
        self._scheduler: Scheduler[Job] = Scheduler(
            in_flight=packer.in_flight, worthwhile=WORTHWHILE_TOKENS[model.device.type]
        )
        self._held = ExitStack()  # beside the table
        self.prefiller = Prefiller(
            model=model,
            draft=with_steps(model.draft, method, packer.ahead_slots, self._held),
            row_rules=self.row_rules,
            save_selection=save_selection,
            now=self.attempts.now,
            phase=phase,
        )
        self._prefix: Prefix | None = None  # of the group whose rows are being prefilled
        self._table: Table | None = None  # made for the first row that is decoded

    @property
    def packer(self) -> Packer:
        """What the device's memory allows."""
        return self.packs.packer

    @packer.setter
    def packer(self, packer: Packer) -> None:
        self.packs.packer = packer

    @property
    def method(self) -> PruningMethod:
        return self.packs.method

    @property
    def is_busy(self) -> bool:
        """Whether there are rows that are not answered."""
        return bool(self._scheduler or self._running)

    @property
    def wants_more(self) -> bool:
        """Whether the documents that wait may soon be too few to fill the batch."""
        return self._scheduler.tokens < 2 * self.packer.pack_tokens

    @property
    def waiting(self) -> list[EncodedDocument]:
        """Documents that no work has been done for."""
        return [waiting.row.document for waiting in self._scheduler.rows]

    def add(self, documents: Sequence[EncodedDocument], *, apart: bool = False) -> None:
        """Let documents wait for their turn, behind those that were added before; `apart` one by one."""
        self._scheduler.add(self.packs.apart(documents) if apart else self.packs.packs(documents))

    def answer(self, documents: Sequence[EncodedDocument]) -> list[Answer]:
        """Answers to these documents, in their order, once no other is left."""
        self.add(documents)
        made: dict[int, Answer] = {}
        while self.is_busy:
            made |= {id(document): answer for document, answer, _ in self.advance()}
        return [made[id(document)] for document in documents]

    def advance(self) -> list[Answered]:
        """Prefill a pack, or queue a decode step: rows that ended meanwhile, often none."""
        running = len(self._running)
        free = self.packer.store_slots if self._table is None else self._table.free
        pack = self._scheduler.next(Room(running=running, slots=free))
        if pack is None:
            return self._step() if running else []
        ended = self._settle()
        if pack.alone:
            return [*ended, *self._answer_alone(pack.rows[0].row)]
        return [*ended, *self._admit([waiting.row for waiting in pack.rows])]

    # prefill

    def _admit(self, jobs: Sequence[Job]) -> list[Answered]:
        """Prefill a pack and let its rows into the batch; returns those that end with their first token."""
        group = jobs[0].group
        if group is None or not self._prefix or self._prefix.pack is not group:
            self._let_go()
        if group is not None and self._prefix is None:
            self._prefix = self._prefixed(jobs)
            if self._prefix is None:
                return []
            jobs = [replace(job, brings=0) for job in jobs]  # whose documents are in the store now
            if not self._has_room(jobs):
                self._scheduler.put_back(self.packs.waiting(jobs))
                return []
        prefix = self._prefix
        shared_s = 0.0 if prefix is None else prefix.seconds
        made = self.attempts.run(partial(self._prefill, jobs, prefix), jobs[0].document, shared_s)
        if isinstance(made, RowError):
            made = self._again(jobs, made)
        following = self._scheduler.first
        if following is None or following.rows[0].row.group is not group:
            self._let_go()  # of its keys and values, before others need the memory
        return made

    def _let_go(self) -> None:
        """No row that is still to be prefilled stands behind the prefix."""
        if self._prefix is not None and self._table is not None:
            self._table.let_go(self._prefix.made.cache)
        self._prefix = None

    def _prefixed(self, jobs: Sequence[Job]) -> Prefix | None:
        """What a group's rows share, prefilled; if it cannot be, all of them wait in other packs."""
        group, started = jobs[0].group, self.attempts.now()
        assert group is not None
        made = self.attempts.run(partial(self._held_prefix, group), group.groups[0].rows[0])
        if isinstance(made, Prefix):
            self.times.add_shared(started, started + made.seconds)
            return made
        others = self._scheduler.remove(lambda pack: pack.rows[0].row.group is group)
        rows = [*jobs, *(waiting.row for pack in others for waiting in pack.rows)]
        self._scheduler.put_back(self.packs.regrouped(group, rows))
        return None

    def _has_room(self, jobs: Sequence[Job]) -> bool:
        """Whether the store has slots for jobs of a group, if its documents were put there unforeseen."""
        needed = sum(waiting.slots for pack in self.packs.waiting(jobs) for waiting in pack.rows)
        return needed <= (self.packer.store_slots if self._table is None else self._table.free)

    def _held_prefix(self, group: GroupPack, check: Check) -> Prefix | None:
        """Documents, prefilled and, if rows read no copy of them, in the store; None without room there."""
        prefix = Prefix.of(group, self.model, self.attempts.now, check)
        whole = prefix.made.layers == self.model.decoder.shape.layers
        return prefix if not whole or self._open_table().hold(prefix.made.cache) else None

    def _prefill(self, jobs: Sequence[Job], prefix: Prefix | None, check: Check) -> list[Answered]:
        pack = self.prefiller.run(jobs, self.packs, check, prefix=prefix)
        running = begun(pack, self.row_rules, self._clock.seconds)
        again = self.packs.not_trusted(pack.jobs, pack.rows, pack.sparse_tokens)
        trusted = [b for b, dense in enumerate(again) if dense is None]
        for b in trusted:
            for answer, token, scores in zip(running[b].answers, pack.tokens[b], pack.scores[b], strict=True):
                answer.take(token, scores)
        ended = [each for b in trusted for each in running[b].answers if each.finish_reason is not None]
        joining = [b for b in trusted if running[b].going]
        if joining:
            self._open_table().join(running, joining, pack)
        # nothing that follows can fail: a pack that does runs again, with rows that have joined
        pack.count(self.times)
        self._scheduler.put_back(self.packs.packed([dense for dense in again if dense is not None]))
        return self._finish(ended)

    def _again(self, jobs: Sequence[Job], failure: RowError) -> list[Answered]:
        """After a prefill that failed: smaller pieces, smaller packs, and at last the culprit alone."""
        decoder = self.model.decoder
        piece = min(decoder.piece_tokens, sum(job.document.prompt_tokens for job in jobs)) // 2
        if failure.kind == "out_of_memory" and piece >= FEWEST_PIECE_TOKENS:
            for each in self.model.decoders:
                each.piece_tokens = piece
            self._scheduler.put_back(self.packs.waiting(jobs))
        elif len(jobs) > 1:
            self._scheduler.put_back(self.packs.halves(jobs))
        elif failure.kind == "out_of_memory":
            in_group = jobs[0].group is not None
            own = self.packs.on_its_own(jobs[0])
            self._scheduler.put_back(self.packs.waiting([own], alone=not in_group))
        else:
            return [self._failed(jobs[0], failure)]
        return []

    # decoding

    @property
    def _running(self) -> Sequence[Running]:
        return () if self._table is None else self._table.rows

    def _step(self) -> list[Answered]:
        """Queue one step for all rows; those that have ended or taken too long leave."""
        self.attempts.check()
        assert self._table is not None
        self._clock.start()
        ended = self._decode(self._table.loop.step)
        if not self._running:
            self._pause()
        return ended

    def _settle(self) -> list[Answered]:
        """Wait for the steps that are on their way, so that a prefill has the device to itself."""
        ended = [] if self._table is None else self._decode(self._table.loop.drain)
        self._pause()
        return ended

    def _pause(self) -> None:
        if decoded_s := self._clock.stop():
            self.times.add_decode(decoded_s, time.perf_counter())

    def _decode(self, act: Callable[[], list[Generated]]) -> list[Answered]:
        """Rows that end by `act`. If it fails all begin anew, each alone, which shows whose fault it is."""
        rows = list(self._running)
        if not rows:
            return []
        made = self.attempts.run(lambda check: act(), rows[0].row.job.document)
        if isinstance(made, RowError):
            self._close_table()
            jobs = list({id(each.row): each.row.job for each in rows}.values())
            self._scheduler.put_back(self.packs.waiting(jobs, alone=True))
            self._note(f"a decode step failed ({made!s}): its {len(jobs):,} rows run again, each alone")
            return []
        ended = [each for each in rows if each.finish_reason is not None]
        return self._finish(ended + self._too_late())

    def _too_late(self) -> list[Running]:
        """Rows that took longer than a row may, by their prefill and the steps that they took part in."""
        most = self.attempts.row_timeout
        if most is None or self._table is None:
            return []
        return self._table.end_late(most, self._clock.seconds)

    def _finish(self, ended: Sequence[Running]) -> list[Answered]:
        """Free what answers that have ended had of the store; returns the rows that end with them."""
        rows = {id(each.row): each.row for each in ended if not each.row.is_over}.values()
        for each in ended:
            if each.extent is not None:
                assert self._table is not None
                self._table.leave(each)
        return [self._output_row(row) for row in rows if row.failure is not None or not row.going]

    def _output_row(self, row: RunningRow) -> Answered:
        """Of a row whose answers have all ended, or one of which has failed."""
        row.is_over = True
        if row.failure is None:
            row.tell_times(self._clock.seconds)
            row.answer.kv_host_bytes, row.answer.kv_swapped_bytes = 0, 0
            return self._written(row.job, row.answer, row.answers, row.began)
        if row.going and self._table is not None:
            self._table.leave_together(row, row.failure)
        late = row.failure == "timeout"
        error = self.attempts.timeout() if late else RowError("not_finite", NOT_FINITE_MESSAGE)
        return self._failed(row.job, self.attempts.described(error, row.job.document))

    def _written(self, job: Job, answer: Answer, generated: Sequence[Generated], began: float) -> Answered:
        """The row with its answers; a fault of the tokenizer costs its row alone."""
        write = partial(add_answers, answer, generated, self.model)
        made = self.attempts.run(lambda _: write(), job.document)
        return Answered(job.document, answer, began) if made is None else self._failed(job, made)

    # rows that run alone

    def _answer_alone(self, job: Job) -> list[Answered]:
        """Answer a document that leaves no room for others, or of which it is to be seen whether it fails."""
        self._close_table()
        packer = self.packs.of(job.method)
        if packer.refuses(job.document):
            return [self._failed(job, RowError("out_of_memory", memory_message(job.document, packer)))]
        run = partial(self._run_alone, job)
        made = self.attempts.run(run, job.document)
        if isinstance(made, RowError) and made.kind == "out_of_memory":
            # a second time, in memory that the larger packs before it no longer hold in pieces
            made = self.attempts.run(run, job.document)
        return [self._failed(job, made)] if isinstance(made, RowError) else made

    def _run_alone(self, job: Job, check: Check) -> list[Answered]:
        rules = self.row_rules.of(job.document.source)
        pack = self.prefiller.run([job], self.packs, check, room=rules.max_new_tokens, kv_dtype=self.kv_dtype)
        (answer,) = pack.rows
        (dense,) = self.packs.not_trusted(pack.jobs, pack.rows, pack.sparse_tokens)
        if dense is not None:
            pack.count(self.times)
            self._scheduler.put_back(self.packs.packed([dense]))
            return []
        generated = decoded_alone(
            self.model, pack, rules, check, row_rules=self.row_rules, stats=self.stats, kv_dtype=self.kv_dtype
        )
        answer.decode_ms = (generated[-1].finished_at - pack.first_at) * 1e3
        answer.kv_host_bytes, answer.kv_swapped_bytes = pack.prefilled.cache.traffic()
        pack.count(self.times)
        self.times.add_decode(generated[-1].finished_at - pack.first_at, generated[-1].finished_at)
        return [self._written(job, answer, generated, pack.began)]

    def _failed(self, job: Job, why: RowError) -> Answered:
        return Answered(job.document, replace(failed(job.document, job.method.name, why), guard=job.guard))

    # memory and time

    def prepare(self, usable_bytes: int) -> str:
        """Divide the device's memory anew, take what the store needs, and capture steps of all sizes.

        Returns what to tell the user of it.
        """
        self.packer = self.packer.within(usable_bytes + held_bytes(self.prefiller.draft))
        return self._open_table().prepare()

    def close(self) -> None:
        """Give back what is held beside the model: another run of this process would find too little."""
        self._close_table()
        self._held.close()

    def _open_table(self) -> Table:
        if self._table is None:
            steps = (self.row_rules, self.stats, self.kv_dtype, self.lookup)
            self._table = Table.of(self.model, self.packer, *steps)
        return self._table

    def _close_table(self) -> None:
        """Give the store's memory up, and with it all rows and documents that are in it."""
        self._prefix = None
        if self._table is not None:
            self._table.close()
            self._table = None
            self.attempts.free()
