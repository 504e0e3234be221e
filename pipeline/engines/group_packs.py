"""How many groups of rows, and how many rows of a large one, fit the device together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.engines.grouping import Group, Grouping, Sharing
from pipeline.engines.memory import Packer, running_bytes
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

    def fits(self, sharing: Sharing, shared_tokens: int, prompt_tokens: int) -> bool:
        """Whether one row can be answered in this way."""
        needed = self._planned_bytes(sharing, [shared_tokens], [(shared_tokens, prompt_tokens)])
        return needed <= self.packer.max_bytes

    def kv_bytes(self, pack: GroupPack, rows: Sequence[Numbered]) -> int:
        """Keys and values of a chunk of rows, and of the documents that the pack's rows share."""
        packer, sharing = replace(self.packer, method=pack.sharing.method), pack.sharing
        shared = sum(group.shared_tokens for group in pack.groups) * sharing.layers
        own = packer.kv_bytes([row.prompt_tokens for _, row in rows])
        return own + shared * packer.shape.kv_bytes_per_token(packer.itemsize)

    def _is_one_chunk(self, pack: GroupPack) -> bool:
        shared = sum(group.shared_tokens for group in pack.groups)
        return shared <= self.packer.pack_tokens and self._fits(pack, pack.rows)

    def _fits(self, pack: GroupPack, rows: Sequence[Numbered]) -> bool:
        prefixes = [group.shared_tokens for group in pack.groups]
        lengths = [(prefixes[number], row.prompt_tokens) for number, row in rows]
        tokens = self._running_tokens(pack.sharing, lengths)
        needed = self._planned_bytes(pack.sharing, prefixes, lengths)
        return tokens <= self.packer.pack_tokens and needed <= self.packer.max_bytes

    def _planned_bytes(
        self, sharing: Sharing, prefixes: Sequence[int], rows: Sequence[tuple[int, int]]
    ) -> int:
        """Bytes of the larger of two steps: the documents, of so many tokens, and then the rows behind them.

        `rows` has the shared tokens and the prompt's of each. Of the documents, keys and values of the shared
        layers stay, and where other layers follow the residual stream; each row has a copy of all that.
        """
        shape, itemsize, new_tokens = self.packer.shape, self.packer.itemsize, self.packer.new_tokens
        per_token = shape.kv_bytes_per_token(itemsize)
        documents = sum(prefixes)
        kept = documents * (sharing.layers * per_token + shape.hidden * itemsize)
        lengths = [prompt for _, prompt in rows]
        behind = replace(self.packer, method=sharing.method).planned_bytes(lengths)
        running = self._running_tokens(sharing, rows)
        behind += running_bytes(shape, itemsize, running) - running_bytes(shape, itemsize, sum(lengths))
        # a method that stores less than it is given, in layers that are shared, has all of it at first
        stored = sharing.method.plan(shape, lengths).cache_tokens[: sharing.layers]
        behind += (
            sum(max(0, sum(lengths) + len(lengths) * new_tokens - tokens) for tokens in stored) * per_token
        )
        return kept + max(running_bytes(shape, itemsize, documents), behind)

    def running_tokens(self, pack: GroupPack, rows: Sequence[Numbered]) -> int:
        """Tokens of a chunk of rows that are in a layer at once, behind the documents."""
        shared = [group.shared_tokens for group in pack.groups]
        return self._running_tokens(
            pack.sharing, [(shared[number], row.prompt_tokens) for number, row in rows]
        )

    def _running_tokens(self, sharing: Sharing, rows: Sequence[tuple[int, int]]) -> int:
        """Tokens that are in a layer at once, behind the documents."""
        whole = sharing.layers < self.packer.shape.layers
        return sum(prompt if whole else prompt - shared for shared, prompt in rows)
