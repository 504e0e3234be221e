"""What is to be done for each document, and the packs in which it waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pipeline.engines.group_packs import GroupPack, GroupPacker, Numbered
from pipeline.engines.grouping import Group, Sharing
from pipeline.engines.memory import Packer
from pipeline.engines.scheduler import Waiting, WaitingPack
from pipeline.pruning.base import PruningMethod
from pipeline.pruning.dense import Dense
from pipeline.records import Answer, EncodedDocument
from pipeline.setup.guard import FLAT, Guard, kind_of

Packs = list[WaitingPack["Job"]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A document and how it is to be answered."""

    document: EncodedDocument
    method: PruningMethod
    guard: str | None = None  # why the method is dense, where a guard chose it
    group: GroupPack | None = None  # with which it is answered, behind the document of
    number: int = 0  # this of its groups
    brings: int = 0  # slots of documents that this job is the first to read, and others after it

    @property
    def row(self) -> Numbered:
        """As a row of its group."""
        return self.number, self.document

    @property
    def runs_again(self) -> bool:
        """Whether the document was prefilled before, and a guard did not trust what came of it."""
        return self.guard is not None and kind_of(self.guard) == FLAT


@dataclass(kw_only=True)
class JobPacker:
    """Documents to packs of jobs, within the memory that there is."""

    packer: Packer  # for the run's method
    group: str = "off"  # or auto, any: rows about the same document are answered together if that is cheaper
    guard: Guard | None = None
    note: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self._noted: set[Sharing] = set()

    @property
    def method(self) -> PruningMethod:
        return self.packer.method

    @property
    def groups(self) -> GroupPacker:
        return GroupPacker(packer=self.packer, any_method=self.group == "any")

    def of(self, method: PruningMethod) -> Packer:
        """The packer of jobs with this method."""
        if method is self.method:
            return self.packer
        return replace(self.packer, method=method, kv_memory=None)

    def packs(self, documents: Sequence[EncodedDocument]) -> Packs:
        """Packs of documents that have just come, those that the guard does not trust last."""
        guard = self.guard
        reasons = [None if guard is None else guard.before(document) for document in documents]
        pairs = list(zip(documents, reasons, strict=True))
        trusted = [document for document, reason in pairs if reason is None]
        groups, alone = self.groups.split(trusted) if self.group != "off" else ([], trusted)
        for group in groups:
            self._note_way(group)
        chunks = [chunk for pack in self.groups.packs(groups) for chunk in self.chunks(pack)]
        others = [self.dense(document, reason) for document, reason in pairs if reason is not None]
        return [
            *self.packed([Job(document=document, method=self.method) for document in alone]),
            *chunks,
            *self.packed(others),
        ]

    def apart(self, documents: Sequence[EncodedDocument]) -> Packs:
        """A pack for each of some documents, which run while no other does."""
        reasons = [None if self.guard is None else self.guard.before(document) for document in documents]
        jobs = [
            Job(document=document, method=self.method) if reason is None else self.dense(document, reason)
            for document, reason in zip(documents, reasons, strict=True)
        ]
        return self.waiting(jobs, alone=True) if jobs else []

    def dense(self, document: EncodedDocument, reason: str) -> Job:
        """A document that a guard has answered without pruning."""
        return Job(document=document, method=Dense(), guard=reason)

    def not_trusted(
        self, jobs: Sequence[Job], answers: Sequence[Answer], sparse_tokens: Sequence[int]
    ) -> list[Job | None]:
        """For each job of a pack the dense one that takes its place, where its prefill is not trusted.

        `sparse_tokens` says how many of each one's first tokens had blocks of attention chosen.
        """
        guard = self.guard
        if guard is None or jobs[0].guard is not None:
            return [None] * len(jobs)
        reasons = [guard.after(answer, n) for answer, n in zip(answers, sparse_tokens, strict=True)]
        pairs = zip(jobs, reasons, strict=True)
        return [None if reason is None else self.dense(job.document, reason) for job, reason in pairs]

    def packed(self, jobs: Sequence[Job]) -> Packs:
        """Jobs of one method, without groups, put together by their lengths."""
        if not jobs:
            return []
        by_document = {id(job.document): job for job in jobs}
        return [
            waiting
            for pack in self.of(jobs[0].method).packs([job.document for job in jobs])
            for waiting in self.waiting([by_document[id(document)] for document in pack])
        ]

    def chunks(self, pack: GroupPack) -> Packs:
        """A pack of groups in as many parts as its prefill needs."""
        brings, waiting = self.groups.stored_slots(pack), []
        for chunk in self.groups.chunks(pack):
            jobs = []
            for number, row in chunk:
                method = pack.sharing.method
                jobs.append(Job(document=row, method=method, group=pack, number=number, brings=brings))
                brings = 0
            waiting += self.waiting(jobs)
        return waiting

    def waiting(self, jobs: Sequence[Job], *, alone: bool = False) -> Packs:
        """A pack of these jobs, and one for each that must run alone, or for all if that is asked for.

        A row that runs alone does so without its group.
        """
        packer = self.of(jobs[0].method)
        together: list[Waiting[Job]] = []
        apart: Packs = []
        for job in jobs:
            tokens = job.document.prompt_tokens
            if alone or not self._fits(job, packer):
                waiting = Waiting(row=self.on_its_own(job), slots=0, tokens=tokens)
                apart.append(WaitingPack(rows=(waiting,), alone=True))
            else:
                slots = self._slots(job, packer)
                slots += job.brings
                together.append(Waiting(row=job, slots=slots, tokens=tokens, answers=packer.n))
        return [*([WaitingPack(rows=tuple(together))] if together else []), *apart]

    def _slots(self, job: Job, packer: Packer) -> int:
        """Of the store, without those of documents that a group's rows share."""
        if job.group is not None:
            return self.groups.slots(job.group, *job.row)
        return packer.slots(job.document.prompt_tokens, packer.room(job.document))

    def _fits(self, job: Job, packer: Packer) -> bool:
        """Whether a job can run beside others."""
        if job.group is None:
            return not packer.runs_alone(job.document)
        shared = job.group.groups[job.number].shared_tokens
        return self.groups.fits(job.group.sharing, shared, [job.document])

    def on_its_own(self, job: Job) -> Job:
        """The same job without its group."""
        return job if job.group is None else Job(document=job.document, method=self.method)

    def halves(self, jobs: Sequence[Job]) -> Packs:
        """Two packs in place of one that failed."""
        half = len(jobs) // 2
        return [*self.waiting(jobs[:half]), *self.waiting(jobs[half:])]

    def regrouped(self, pack: GroupPack, jobs: Sequence[Job]) -> Packs:
        """In place of groups whose documents cannot be prefilled: halves of them, or each row on its own.

        `jobs` are those of the pack's rows that are not answered yet.
        """
        open_rows = {id(job.document) for job in jobs}
        left = [
            replace(group, rows=rows)
            for group in pack.groups
            if (rows := tuple(row for row in group.rows if id(row) in open_rows))
        ]
        if len(left) == 1:
            return self.packed([self.on_its_own(job) for job in jobs])
        half = len(left) // 2
        parts = (tuple(left[:half]), tuple(left[half:]))
        return [chunk for groups in parts for chunk in self.chunks(GroupPack(groups=groups))]

    def _note_way(self, group: Group) -> None:
        """Say once how rows are answered together, and why in this way."""
        if group.sharing not in self._noted:
            self._noted.add(group.sharing)
            self.note(
                f"rows about the same document are answered together (--group {self.group}); {group.reason}"
            )
