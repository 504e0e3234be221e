"""Rotary embeddings of some tokens; a model may have several kinds, each of some of its layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pipeline.kernels.fused import rope_

Table = tuple[Tensor, Tensor]  # cosines and sines, (T, d) each, or of the first dimensions of a head


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Of tokens at original positions: a table of each kind that the model's layers have."""

    tables: dict[str, Table]
    query_scale_T: Tensor | None = None  # of queries, where that depends on the position

    def of(self, kind: str | None) -> Table | None:
        """None for layers without one, and if it is `UNROTATED`."""
        return self.tables[kind] if kind is not None and self.tables else None

    def turn_(self, q_THd: Tensor, k_TKd: Tensor, kind: str | None) -> None:
        """Turn queries and keys of a layer with an embedding of this `kind`, in place, and scale queries."""
        table = self.of(kind)
        if table is not None:
            turned = slice(0, table[0].shape[-1])
            rope_(q_THd[..., turned], k_TKd[..., turned], *table)
        if self.query_scale_T is not None:
            q_THd.mul_(self.query_scale_T[:, None, None])

    def at(self, tokens: slice | Tensor) -> Rope:
        """Of some of the tokens, (C,) of their places."""
        scale_T = self.query_scale_T
        return Rope(
            tables={kind: (cos[tokens], sin[tokens]) for kind, (cos, sin) in self.tables.items()},
            query_scale_T=None if scale_T is None else scale_T[tokens],
        )


UNROTATED = Rope(tables={})  # leaves queries and keys as they are before RoPE
