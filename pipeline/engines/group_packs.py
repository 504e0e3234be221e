"""How many groups of rows, and how many rows of a large one, fit the device together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.engines.grouping import Group, Grouping, Sharing
from pipeline.engines.memory import Packer
from pipeline.model.activations import merged_bytes, running_bytes
from pipeline.model.store import slots_needed
from pipeline.records import EncodedDocument

Numbered = tuple[int, EncodedDocument]  # a row, and which of the pack's groups it is of


@dataclass(frozen=True, kw_only=True)
class GroupPack:
    """Groups whose documents are prefilled together, all answered in the same way."""

    groups: tuple[Group, ...]

    @property
    def sharing(self) -> Sharing:
        return self.groups[0].sharing

    @property
    def rows(self) -> list[Numbered]:
        return [(number, row) for number, group in enumerate(self.groups) for row in group.rows]


@dataclass(frozen=True, kw_only=True)
class GroupPacker:
    """Groups to packs, and packs to chunks of rows, within the tokens and bytes of ordinary packs."""

    packer: Packer
    any_method: bool = False  # dense may take the place of the packer's method

    def split(self, rows: Sequence[EncodedDocument]) -> tuple[list[Group], list[EncodedDocument]]:
        """Rows that are to be answered together, each group in a way that fits, and the others."""
        if self.packer.kv_memory is not None:  # a document that may be offloaded runs alone
            return [], list(rows)
        grouping = Grouping(
            method=self.packer.method,
            shape=self.packer.shape,
            fits=self.fits,
            any_method=self.any_method,
            new_tokens=self.packer.new_tokens,
            itemsize=self.packer.itemsize,
            device=self.packer.device.type,
        )
        return grouping.split(rows)

    def packs(self, groups: Sequence[Group]) -> list[GroupPack]:
        """Groups of like length together; one that is too large to be answered at once has its own."""
        packs: list[GroupPack] = []
        for group in sorted(groups, key=lambda group: (group.sharing.layers, -group.shared_tokens)):
            if packs and packs[-1].sharing == group.sharing:
                longer = GroupPack(groups=(*packs[-1].groups, group))
                if self._is_one_chunk(longer):
                    packs[-1] = longer
                    continue
            packs.append(GroupPack(groups=(group,)))
        return packs

    def chunks(self, pack: GroupPack) -> Iterator[list[Numbered]]:
        """The rows of a pack in as many parts as the device needs; a row over the budgets is a part alone."""
        chunk: list[Numbered] = []
        for row in pack.rows:
            if chunk and not self._fits(pack, [*chunk, row]):
                yield chunk
                chunk = []
            chunk.append(row)
        yield chunk

    def fits(self, sharing: Sharing, shared_tokens: int, rows: Sequence[EncodedDocument]) -> bool:
        """Whether each of these rows can be answered in this way."""
        longest = max(row.prompt_tokens for row in rows)
        needed = self._planned_bytes(sharing, [shared_tokens], [(shared_tokens, longest)])
        most = max(self._slots(sharing, shared_tokens, row) for row in rows)
        slots = self._stored_slots(sharing, [shared_tokens]) + most
        return needed <= self.packer.max_bytes and slots <= self.packer.store_slots

    def slots(self, pack: GroupPack, number: int, row: EncodedDocument) -> int:
        """Slots that a row needs in the store, those of its document left out if it reads them there."""
        return self._slots(pack.sharing, pack.groups[number].shared_tokens, row)

    def stored_slots(self, pack: GroupPack) -> int:
        """Slots of the documents of a pack's groups, which their rows read in the store."""
        return self._stored_slots(pack.sharing, [group.shared_tokens for group in pack.groups])

    def kv_bytes(self, pack: GroupPack, rows: Sequence[Numbered]) -> int:
        """Keys and values of a chunk of rows, and of the documents that the pack's rows share."""
        whole, prefixes = self._is_whole(pack.sharing), [group.shared_tokens for group in pack.groups]
        lengths = [row.prompt_tokens - prefixes[number] * whole for number, row in rows]
        shared = (
            sum(prefixes) * pack.sharing.layers * self.packer.shape.kv_bytes_per_token(self.packer.itemsize)
        )
        return self._of(pack.sharing).kv_bytes(lengths) + shared

    def _slots(self, sharing: Sharing, shared: int, row: EncodedDocument) -> int:
        own = row.prompt_tokens - shared if self._is_whole(sharing) else row.prompt_tokens
        # answers that read a document have each a copy of what stands behind it
        return self._of(sharing).slots(own, self.packer.room(row), shares=not self._is_whole(sharing))

    def _stored_slots(self, sharing: Sharing, prefixes: Sequence[int]) -> int:
        if not self._is_whole(sharing):
            return 0
        layers = self.packer.shape.layers
        return sum(slots_needed([tokens] * layers, 0, self.packer.device) for tokens in prefixes)

    def _of(self, sharing: Sharing) -> Packer:
        return replace(self.packer, method=sharing.method)

    def _is_whole(self, sharing: Sharing) -> bool:
        """Whether rows share all layers: then nothing is copied for them."""
        return sharing.layers == self.packer.shape.layers

    def _is_one_chunk(self, pack: GroupPack) -> bool:
        shared = sum(group.shared_tokens for group in pack.groups)
        slots = self.stored_slots(pack) + max(self.slots(pack, *row) for row in pack.rows)
        stores = slots <= self.packer.store_slots  # else no row of it would ever be let in
        return stores and shared <= self.packer.pack_tokens and self._fits(pack, pack.rows)

    def planned_bytes(self, pack: GroupPack, rows: Sequence[Numbered]) -> int:
        """Bytes that the prefills of a pack's documents and of a chunk of its rows need."""
        prefixes = [group.shared_tokens for group in pack.groups]
        lengths = [(prefixes[number], row.prompt_tokens) for number, row in rows]
        return self._planned_bytes(pack.sharing, prefixes, lengths)

    def _fits(self, pack: GroupPack, rows: Sequence[Numbered]) -> bool:
        needed = self.planned_bytes(pack, rows)
        fits = self.running_tokens(pack, rows) <= self.packer.pack_tokens and needed <= self.packer.max_bytes
        return fits and pack.sharing.method.alike([row.prompt_tokens for _, row in rows])

    def _planned_bytes(
        self, sharing: Sharing, prefixes: Sequence[int], rows: Sequence[tuple[int, int]]
    ) -> int:
        """Bytes of the larger of two steps: the documents, of so many tokens, and then the rows behind them.

        `rows` has the shared tokens and the prompt's of each. Of the documents, keys and values of the shared
        layers stay, and where other layers follow the residual stream, of all of which each row has a copy.
        """
        shape, itemsize, new_tokens = self.packer.shape, self.packer.itemsize, self.packer.new_tokens
        per_token, packer = shape.kv_bytes_per_token(itemsize), self._of(sharing)
        documents = sum(prefixes)
        kept = documents * (sharing.layers * per_token + shape.hidden * itemsize)
        if self._is_whole(sharing):
            own = [prompt - shared for shared, prompt in rows]
            longest = max(prompt for _, prompt in rows)
            behind = packer.planned_bytes(own) + merged_bytes(shape, sum(own), self.packer.device)
            behind += packer.mask_bytes(max(own), longest)
        else:
            lengths = [prompt for _, prompt in rows]
            # a method that stores less than it is given, in layers that are shared, has all of it at first
            most = sum(lengths) + len(lengths) * new_tokens
            stored = sharing.method.plan(shape, lengths).cache_tokens[: sharing.layers]
            first = sum(max(0, most - tokens) for tokens in stored) * per_token
            behind = packer.planned_bytes(lengths) + first
        return kept + max(running_bytes(shape, itemsize, documents), behind)

    def running_tokens(self, pack: GroupPack, rows: Sequence[Numbered]) -> int:
        """Tokens of a chunk of rows that are in a layer at once, behind the documents."""
        shared = [group.shared_tokens * self._is_whole(pack.sharing) for group in pack.groups]
        return sum(row.prompt_tokens - shared[number] for number, row in rows)
