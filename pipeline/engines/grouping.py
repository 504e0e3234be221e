"""Which rows ask about the same document, and how they are best answered together. No tensors here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING

from pipeline.pruning.capabilities import SharesDocuments, expected_passes
from pipeline.pruning.operations import LayerWork, dense_work, layer_flops, passes_flops
from pipeline.pruning.shape import ModelShape
from pipeline.records import EncodedDocument
from pipeline.texts.words import counted

if TYPE_CHECKING:
    from pipeline.pruning.base import PruningMethod

# of the operations without sharing, above which a second forward pass and the copies cost what they save
WORTH_SHARING = 0.9
# that a device does while it reads a byte of its memory: an A100 156 in bfloat16, an H100 295
OPERATIONS_A_BYTE = {"cpu": 10, "cuda": 200}


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """One way of answering rows together: their document runs once through `layers` layers.

    Behind these each row's whole prompt goes on, pruned by `method`; with all of the model's layers, only
    what stands behind the document is left to each row.
    """

    method: PruningMethod
    layers: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows, two or more, whose prompts are the same up to the end of the document."""

    rows: tuple[EncodedDocument, ...]
    sharing: Sharing
    reason: str  # why in this way, for people
    flops: int  # of all their prefills

    @property
    def shared_tokens(self) -> int:
        return self.rows[0].spans.document[1]


Fits = Callable[[Sharing, int, Sequence[EncodedDocument]], bool]  # each row, by the tokens that they share


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """Finds groups among rows, and chooses how each is answered, by counting operations.

    Ways that are compared: the layers before the method's first drop or skip computed once, and the rest for
    each row; each row on its own; and, with `any_method`, the document computed once by every layer, without
    pruning, for all its questions. Decoding counts by the keys and values that its steps read: rows that
    share all layers read those of their document once for all of them, others each what its method has left.
    """

    method: PruningMethod
    shape: ModelShape
    new_tokens: int = 0  # of an answer, at most
    itemsize: int = 2  # bytes of a key's or a value's number
    device: str = "cuda"  # its type
    fits: Fits = lambda sharing, shared, rows: True
    any_method: bool = False

    def split(self, rows: Iterable[EncodedDocument]) -> tuple[list[Group], list[EncodedDocument]]:
        """Groups, and rows that are better answered on their own, both in the order of the rows."""
        groups, alone = [], []
        for same in same_documents(rows):
            group = self.choose(same) if len(same) > 1 else None
            if group is None:
                alone += same
            else:
                groups.append(group)
        return groups, alone

    def choose(self, rows: Sequence[EncodedDocument]) -> Group | None:
        """The cheapest way that fits; None if it is to answer each row on its own."""
        shared = rows[0].spans.document[1]
        lengths = [row.prompt_tokens for row in rows]
        apart = self._work(Sharing(method=self.method, layers=0), lengths, shared)
        if apart is None:
            return None
        costs = [(self._work(sharing, lengths, shared), sharing) for sharing in self.sharings]
        fitting = [
            (work, number, sharing)
            for number, (work, sharing) in enumerate(costs)
            if work is not None and self.fits(sharing, shared, rows)
        ]
        work, _, sharing = min(fitting, default=(apart, 0, None))
        if sharing is None or work > WORTH_SHARING * apart:
            return None
        flops = self._flops(sharing, lengths, shared)
        assert flops is not None
        reason = (
            f"{len(rows):,} rows about a document of {counted(rows[0].document_tokens, 'token')}: "
            f"{self._told(sharing)}; it takes {_share(work / apart)} of the work of each row on its own"
        )
        return Group(rows=tuple(rows), sharing=sharing, reason=reason, flops=flops)

    @cached_property
    def sharings(self) -> tuple[Sharing, ...]:
        """The method's own sharing, where it has any, and with `any_method` the document without pruning.

        None of a model whose rows cannot share documents.
        """
        if not self.shape.shares_documents:
            return ()
        from pipeline.pruning.dense import Dense

        dense = Dense.attending_as(self.method, self.shape)
        method = self.method
        layers = method.shared_layers(self.shape) if isinstance(method, SharesDocuments) else 0
        own = Sharing(method=method, layers=layers)
        if own.layers == self.shape.layers:
            return (own,)
        without = (Sharing(method=dense, layers=self.shape.layers),) if self.any_method else ()
        return (*((own,) if own.layers else ()), *without)

    def _work(self, sharing: Sharing, lengths: Sequence[int], shared_tokens: int) -> int | None:
        """Operations of all prefills, and as many as a device does while the answers' steps read."""
        flops = self._flops(sharing, lengths, shared_tokens)
        if flops is None:
            return None
        whole = sharing.layers == self.shape.layers
        own = [length - shared_tokens * whole for length in lengths]
        read = sum(sum(sharing.method.plan(self.shape, (length,)).cache_tokens) for length in own)
        read += shared_tokens * self.shape.layers * whole
        a_step = read * self.shape.kv_bytes_per_token(self.itemsize)
        return flops + self.new_tokens * a_step * OPERATIONS_A_BYTE[self.device]

    def _flops(self, sharing: Sharing, lengths: Sequence[int], shared_tokens: int) -> int | None:
        """Operations of all prefills, the document's in the shared layers counted once."""
        layers = sharing.layers
        passes = [expected_passes(sharing.method, self.shape, length) for length in lengths]
        known = [each for each in passes if each is not None]
        if len(known) < len(passes):
            return None
        whole = LayerWork(shared_tokens, shared_tokens)
        shared = [whole] * layers if layers < self.shape.layers else dense_work(self.shape, shared_tokens)
        document = sum(layer_flops(self.shape, work) for work in shared)
        return sum(passes_flops(self.shape, each) for each in known) - (len(lengths) - 1) * document

    def _told(self, sharing: Sharing) -> str:
        if sharing.layers < self.shape.layers:
            some = f"{sharing.layers:,} of {self.shape.layers:,}"
            return f"its first layers, {some}, are computed once for all of them"
        if sharing.method.name == self.method.name:
            return "the document is computed once for all of them"
        return (
            f"answered with {sharing.method.name}, because sharing the document that way is cheapest "
            f"(--group off keeps {self.method.name})"
        )


def same_documents(rows: Iterable[EncodedDocument]) -> list[list[EncodedDocument]]:
    """Rows put together whose prompts are the same up to the document's end, in the order of the first ones.

    A prompt that ends with its document shares nothing: it has no token of its own to run.
    """
    found: dict[object, list[EncodedDocument]] = {}
    for row in rows:
        end = row.spans.document[1]
        has_more = end < row.prompt_tokens
        digest = blake2b(row.input_ids[:end].tobytes(), digest_size=16).digest()
        found.setdefault((end, digest) if has_more else (end, id(row)), []).append(row)
    return list(found.values())


def _share(value: float) -> str:
    """A per cent that is not 0 for any work at all."""
    return f"{value:.0%}" if value >= 0.01 else "less than 1%"
