"""How much memory a pack may take and how much it will, and the packs that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import psutil
import torch

from pipeline.checkpoints.device_memory import NO_REMEDIES, Remedies
from pipeline.engines.packing import make_packs
from pipeline.errors import ConfigError
from pipeline.families.decoder import Decoder
from pipeline.generation.draft_steps import slots_for_steps
from pipeline.kernels.scoring import SCORES_AT_ONCE
from pipeline.model.activations import (
    SCORE_BYTES,
    SCORING_QUERIES,
    activation_bytes,
    choosing_bytes,
    lean_bytes,
    mask_bytes,
    piece_bytes,
    running_bytes,
)
from pipeline.model.offload import KvLimits
from pipeline.model.store import slots_needed
from pipeline.pruning.base import PruningMethod
from pipeline.pruning.capabilities import HoldsUnrotatedKeys, ReadsAhead, SkipsInSteps
from pipeline.pruning.shape import PIECE_TOKENS, QUERY_PIECES, ModelShape
from pipeline.pruning.speculative import DraftReader
from pipeline.ranks.leading import on_every_rank
from pipeline.records import EncodedDocument
from pipeline.texts.words import either

# larger packs fill no device better, and every row waits for its whole pack's prefill
MOST_PACK_TOKENS = {"cpu": 8192, "cuda": 32768}
# rows decoded together when the user names no number: more cost a CPU more than they save
IN_FLIGHT = {"cpu": 16, "cuda": 256}
# of a document for whose prefill memory is set aside, if that leaves enough for the store: what is longer
# runs alone, without the store
LONGEST_BESIDE_STORE = 131_072
FIRST_AT_ONCE = 256  # answers of a pack whose first tokens are chosen together, from a copy of logits each
PREFILL_SHARE = 1 / 3  # of the memory, which that may take at most
USABLE = {"cpu": 0.7, "cuda": 0.9}  # of what is free; the rest is for allocators and estimates gone wrong


@dataclass(frozen=True, kw_only=True)
class Packer:
    """Documents to packs, each within the tokens and bytes that there are for one method on one device."""

    device: torch.device
    method: PruningMethod
    shape: ModelShape
    itemsize: int
    new_tokens: int  # that a row is given room for, its drafts included
    pack_tokens: int
    max_bytes: int  # that a prefill may take beside the store
    store_bytes: int = 0  # of keys and values of the rows that are decoded
    in_flight: int = 1  # rows that are decoded together, at most
    kv_memory: int | None = None  # bytes of K/V on the device, beyond which a document runs alone, offloaded
    kv_itemsize: int | None = None  # bytes of a number in the store, where that is not `itemsize`
    drafts: int = 0  # of these new tokens
    n: int = 1  # answers to a prompt, each a row of its own once it is decoded
    cuts_queries: bool = True  # see `AttentionBackend.cuts_queries`
    draft: ModelShape | None = None  # of the model that reads prompts first, if one does
    ahead_slots: int = 0  # of its store for look-ahead steps
    host_bytes: int = 0  # for what is offloaded, as free at the start: pinned memory stays for the next pack
    remedies: Remedies = NO_REMEDIES  # that a user may give for a document that is too large

    @classmethod
    def on(
        cls,
        device: torch.device,
        method: PruningMethod,
        shape: ModelShape,
        *,
        itemsize: int,
        new_tokens: int,
        drafts: int = 0,
        n: int = 1,
        pack_tokens: int | None,
        kv_memory: int | None = None,
        kv_itemsize: int | None = None,
        in_flight: int | None = None,
        free: int | None = None,
        cuts_queries: bool = True,
        draft: ModelShape | None = None,
        remedies: Remedies = NO_REMEDIES,
    ) -> Self:
        """With what is free on the device now; raises ConfigError for settings that do not fit the model.

        `shape` is that of the part of the model that is on the device, `draft` that of the model that reads
        prompts for a method that wants it, and `free` the bytes there that may be used, where they are known.
        `in_flight` is as the user gives it, or 0 where prefills are all that is to be done. It is raised to
        `n`, so that all answers to a prompt are decoded together.
        """
        method.check_depth(shape)
        rows = IN_FLIGHT[device.type] if in_flight is None else in_flight
        rows = min(rows, 1) if pack_tokens == 1 else rows
        method.plan(shape, (1,))  # the model's depth, say, should fail here and not in a pack
        if isinstance(method, SkipsInSteps) and max(rows, n) > 1:
            raise ConfigError(f"method {method.name} needs in_flight=1, so that each row is decoded alone")
        whole = cls(
            device=device,
            method=method,
            shape=shape,
            itemsize=itemsize,
            new_tokens=new_tokens + drafts,
            drafts=drafts,
            n=n,
            pack_tokens=pack_tokens
            or default_pack_tokens(shape, itemsize=itemsize, device=device, free=free),
            max_bytes=0,
            in_flight=max(rows, n) if rows else 0,
            kv_memory=kv_memory,
            kv_itemsize=kv_itemsize,
            cuts_queries=cuts_queries,
            draft=draft,
            host_bytes=host_kv_bytes(),
            remedies=remedies,
        )
        return whole.within(free_bytes(device) if free is None else free)

    def within(self, usable: int) -> Self:
        """The same with so many bytes, divided between the store and the prefills beside it.

        A draft's store for its steps comes first. Rows of a method that holds keys itself need none, and are
        decoded one by one.
        """
        if self._key_holder is not None:
            return replace(self, max_bytes=usable, store_bytes=0, in_flight=min(self.in_flight, 1))
        tokens = max(self.pack_tokens, min(self.shape.context, LONGEST_BESIDE_STORE))
        ahead, of_slot = slots_for_steps(self.draft, self.method, tokens, usable, self.itemsize, self.device)
        usable -= ahead * of_slot
        while tokens > 1 and self.planned_bytes([tokens]) > PREFILL_SHARE * usable:
            tokens //= 2
        longest = slots_needed([self.shape.context] * self.shape.layers, self.new_tokens, self.device)
        most = [usable - self.planned_bytes([tokens]), self.in_flight * longest * self.slot_bytes]
        store = max(0, min([*most, self.kv_memory] if self.kv_memory is not None else most))
        # what the store does not take, prefills may
        return replace(self, max_bytes=usable - store, store_bytes=store, ahead_slots=ahead)

    @cached_property
    def _key_holder(self) -> HoldsUnrotatedKeys | None:
        """The method, if it holds each document's keys itself."""
        return self.method if isinstance(self.method, HoldsUnrotatedKeys) else None

    @property
    def all_bytes(self) -> int:
        """What a prefill may take when there is no store."""
        return self.max_bytes + self.store_bytes

    @property
    def slot_bytes(self) -> int:
        """Of a token's keys and values in one layer of the store."""
        return self.shape.kv_bytes_per_token(self.kv_itemsize or self.itemsize)

    @property
    def store_slots(self) -> int:
        """Of all rows that are decoded together."""
        return self.store_bytes // self.slot_bytes

    @property
    def batch_tokens(self) -> int:
        """Prompt tokens that the store holds, or a pack where that is more."""
        return max(self.pack_tokens, self.store_slots // self.shape.layers)

    def room(self, document: EncodedDocument) -> int:
        """New tokens that a row is given room for, by its own limit or the run's."""
        own = document.source.params.max_new_tokens
        return self.new_tokens if own is None else own + self.drafts

    def slots(self, prompt_tokens: int, room: int, *, shares: bool = True) -> int:
        """Slots that a prompt may need in the store, with `room` for the new tokens of each of its answers.

        How many it needs is known after its prefill. Several answers read the same keys and values, if the
        model's rows can, or without `shares` a copy each.
        """
        stored = self.method.plan(self.shape, (prompt_tokens,)).cache_tokens
        if self.n == 1 or not (shares and self.shape.shares_documents):
            return self.n * slots_needed(stored, room, self.device)
        of_each = slots_needed([0] * len(stored), room, self.device)
        return slots_needed(stored, 0, self.device) + self.n * of_each

    def runs_alone(self, document: EncodedDocument) -> bool:
        """Whether a document is too large to run beside others: its prefill, or its keys and values.

        Or whether its method holds these itself, of each document on its own.
        """
        prompt_tokens = document.prompt_tokens
        return (
            self._key_holder is not None
            or self.planned_bytes([prompt_tokens]) > self.max_bytes
            or self.slots(prompt_tokens, self.room(document)) > self.store_slots
            or not self._may_share([prompt_tokens])
        )

    def bytes_alone(self, document: EncodedDocument) -> int:
        """Bytes that a document needs that runs alone, with the room for its answer.

        Its keys and values are stored as they are to be decoded.
        """
        lengths, own = [document.prompt_tokens], replace(self, new_tokens=self.room(document))
        prefill = own._prefill_bytes(lengths) + own.kv_bytes(lengths, self.kv_itemsize)
        return max(prefill, self._draft_bytes(lengths))

    def refuses(self, document: EncodedDocument) -> bool:
        """Whether a document that runs alone is not to be tried: it would fail after all the time it takes.

        A CPU's system kills a process that takes too much, with no error to catch. On a GPU what is planned
        must exceed all that was free, and be close to what is taken.
        """
        needed = self.bytes_alone(document)
        if self.device.type == "cpu":
            return needed > self.all_bytes
        closely = not self.method.reads_layers and not isinstance(self.method, ReadsAhead)
        return closely and needed > self.all_bytes / USABLE[self.device.type]

    @property
    def limits(self) -> KvLimits | None:
        """What a pack's cache may hold on the device and on the host."""
        if self.kv_memory is None:
            return None
        return KvLimits(device_bytes=self.kv_memory, host_bytes=self.host_bytes)

    def packs(self, documents: Sequence[EncodedDocument]) -> list[list[EncodedDocument]]:
        return make_packs(
            documents,
            pack_tokens=self.pack_tokens,
            max_bytes=self.max_bytes,
            planned_bytes=self.planned_bytes,
            may_share=self._may_share,
        )

    def planned_bytes(self, lengths: Sequence[int]) -> int:
        """Bytes that a pack of prompts of these lengths needs: planned K/V, activations, logits.

        A draft gives what it has needed back before the model begins.
        """
        prefill = self._prefill_bytes(lengths) + self.kv_bytes(lengths)
        return max(prefill, self._draft_bytes(lengths))

    def _prefill_bytes(self, lengths: Sequence[int]) -> int:
        """The same without keys and values, of the model alone."""
        logits = len(lengths) * self.shape.vocab * (self.itemsize + 4)
        if self.n > 1:  # a copy for each answer
            logits += min(len(lengths) * self.n, FIRST_AT_ONCE) * self.shape.vocab * 4
        entering = self.method.most_kept(lengths) if isinstance(self.method, ReadsAhead) else lengths
        return self._running_bytes(entering) + logits

    def _draft_bytes(self, lengths: Sequence[int]) -> int:
        """Bytes that a draft, or without one the model, needs to read a pack of prompts and to go on."""
        if not isinstance(self.method, ReadsAhead):
            return 0
        draft = self.draft or self.shape
        reader, count = DraftReader(ahead=self.method), self.method.look_ahead
        own = replace(self, method=reader, shape=draft, new_tokens=count, n=1, kv_memory=None)
        queries = count * draft.heads * draft.head_dim * draft.layers
        scores = (draft.layers + 2 + count) * sum(lengths) * 4
        return own.planned_bytes(lengths) + len(lengths) * queries * self.itemsize + scores

    def _running_bytes(self, lengths: Sequence[int]) -> int:
        """Bytes that a pack needs while a layer runs."""
        shape, tokens, longest = self.shape, sum(lengths), max(lengths)
        if (holder := self._key_holder) is not None:
            chunk = min(longest, holder.chunk_tokens(PIECE_TOKENS))
            running = running_bytes(shape, self.itemsize, chunk)
            return running + holder.attention_bytes(shape, self.itemsize, longest, chunk)
        chosen = any(mass for mass in self.method.masses_in(shape))
        beside = choosing_bytes(shape, self.itemsize, longest) if chosen else 0
        beside += self._window_mask_bytes(longest)
        if not self.method.reads_layers and (self.cuts_queries or tokens <= QUERY_PIECES * PIECE_TOKENS):
            if longest > QUERY_PIECES * PIECE_TOKENS:
                beside += self.mask_bytes(QUERY_PIECES * PIECE_TOKENS, longest)
            return lean_bytes(shape, self.itemsize, tokens) + beside
        scores = min(SCORES_AT_ONCE, SCORING_QUERIES * shape.heads * longest) * SCORE_BYTES
        return running_bytes(shape, self.itemsize, tokens) + beside + scores

    def _window_mask_bytes(self, longest: int) -> int:
        """Of the layers' masks that leave out what is beyond their windows."""
        widest = max((window for window in self.shape.windows if window and window < longest), default=0)
        return self.mask_bytes(longest, widest) if widest else 0

    def mask_bytes(self, queries: int, seen: int) -> int:
        """Of the mask for some queries that see so many keys, where attention wants one: on a CPU."""
        return mask_bytes(queries, seen, self.itemsize) if self.device.type == "cpu" else 0

    def kv_bytes(self, lengths: Sequence[int], itemsize: int | None = None) -> int:
        """Keys and values that the device holds, as a pack's are, or of `itemsize` bytes a number."""
        planned = self.method.plan(self.shape, lengths).kv_bytes(itemsize or self.itemsize, self.new_tokens)
        return planned if self.kv_memory is None else min(planned, self.kv_memory)

    def _may_share(self, lengths: Sequence[int]) -> bool:
        """Only what takes the same passes, and stays on the device: no active blocks depend on others."""
        if not (alike := self.method.alike(lengths)) or self.kv_memory is None:
            return alike
        planned = self.method.plan(self.shape, lengths).kv_bytes(self.itemsize, self.new_tokens)
        return planned <= self.kv_memory


def memory_message(document: EncodedDocument, packer: Packer) -> str:
    """How much memory a document needs, how much there is, and what to do."""
    needed, ways = packer.bytes_alone(document), packer.remedies.for_document(packer.itemsize)
    return (
        f"{document.source.place}: {document.prompt_tokens} tokens need about {needed / 1e9:.1f} GB on "
        f"{packer.device} and {packer.all_bytes / 1e9:.1f} GB are usable; "
        f"--on-overlong does not help here: shorten the document, or use {either(ways)}"
    )


def free_bytes(device: torch.device) -> int:
    """Memory that a pack may use, in bytes."""
    if device.type == "cuda":
        # weights that were joined or quantised while loading are still the allocator's
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    return int(free * USABLE[device.type])


@on_every_rank
def least_free_bytes(decoder: Decoder) -> int:
    """Memory in bytes that a pack may use on each device that has a part of the model."""
    ranks, free = decoder.ranks, free_bytes(decoder.device)
    if ranks is None:
        return free
    if ranks.device.type == "cpu":  # which all of them share
        free //= ranks.count
    return int(ranks.least(torch.tensor([free], device=ranks.device)))


def host_kv_bytes() -> int:
    """Host memory that offloaded keys and values may take, in bytes: half of what is free."""
    return psutil.virtual_memory().available // 2


def default_pack_tokens(
    shape: ModelShape, *, itemsize: int, device: torch.device, free: int | None = None
) -> int:
    """Tokens of a pack when the user names none: what free memory holds, up to what a device needs."""
    free = free_bytes(device) if free is None else free
    per_token = shape.layers * shape.kv_bytes_per_token(itemsize) + activation_bytes(shape, itemsize)
    tokens = free // (per_token + piece_bytes(shape, itemsize, 1))
    if tokens >= PIECE_TOKENS:
        tokens = (free - piece_bytes(shape, itemsize, PIECE_TOKENS)) // per_token
    return max(1, min(MOST_PACK_TOKENS[device.type], tokens))
