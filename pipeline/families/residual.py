"""What layers add to the residual stream, on one rank or summed over several, and the norm that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from pipeline.families.projection import Norm, Projection
from pipeline.kernels.fused import Quantised, empty_fp8
from pipeline.kernels.step import Product, add_product_
from pipeline.ranks.collectives import Ranks


@dataclass(frozen=True)
class Normed:
    """Rows of the residual stream after a norm, in fp8, which one kernel makes with the sum before the norm.

    They are of use to whoever reads the stream by this norm, as long as nobody changes the stream.
    """

    norm: Norm
    quantised: Quantised  # (T, D) and (T, 1)

    def at(self, rows: slice) -> Self:
        """Some of them, as views."""
        values_TD, scale_T1 = self.quantised
        return type(self)(self.norm, (values_TD[rows], scale_T1[rows]))


@dataclass(frozen=True)
class ResidualSums:
    """Sums in place of the residual stream and what attention or the FFN adds to it."""

    ranks: Ranks | None
    scale: float  # of what is added, by the family

    def room(
        self, norm: Norm | None, total_TD: Tensor, post_norm: Norm | None, reuse: Normed | None = None
    ) -> Normed | None:
        """Room for the sum's rows after its `norm`; None where the two are not one kernel.

        Whoever adds to the stream then gives it to `add_` or `add_projected_`. The rows of `reuse`, which are
        read no more when a sum is written, become the room where there are any.
        """
        plain = self.ranks is None and post_norm is None and self.scale == 1
        if norm is None or not plain or norm.weight.dtype != total_TD.dtype:
            return None
        return Normed(norm, empty_fp8(total_TD, total_TD.shape[1]) if reuse is None else reuse.quantised)

    def settle(self, hidden_TD: Tensor) -> None:
        """Before these rows of the stream are read or written: see `Ranks.settle`."""
        if self.ranks is not None:
            self.ranks.settle(hidden_TD)

    def add_projected_(
        self,
        total_TD: Tensor,
        projection: Projection,
        given: Tensor | Quantised,
        post_norm: Norm | None,
        *,
        later: bool,
        normed: Normed | None = None,
    ) -> None:
        """Add a projection, in fp8 of what is quantised, after its norm if any, and norm the sum if asked.

        With `later` sums over ranks may be on their way afterwards.
        """
        self.settle(total_TD)
        ranks, plain = self.ranks, post_norm is None and self.scale == 1
        if plain and ranks is not None and not ranks.leads:
            # the stream itself is summed, to which the first rank has added its part
            projection.write(given, total_TD)
        elif plain and isinstance(given, Tensor):
            projection.add_to_(total_TD, given)
        else:
            added_TD = projection.write(given)
            added_TD = added_TD if plain or ranks is None else ranks.sum_(added_TD)
            self.add_(total_TD, added_TD, post_norm, normed)
        if plain and ranks is not None:
            ranks.sum_(total_TD, later=later)

    def add_(
        self,
        total_TD: Tensor,
        added_TD: Tensor,
        post_norm: Norm | None,
        normed: Normed | None = None,
    ) -> None:
        """Add what all ranks have, after a norm if any, by the family's scale, and norm the sum if asked."""
        if normed is not None:
            normed.norm.quantised_sum_(total_TD, Product(added_TD), normed.quantised)
            return
        added_TD = added_TD if post_norm is None else post_norm(added_TD)
        total_TD.add_(added_TD, alpha=self.scale)

    def add_product_(self, total_BD: Tensor, added: Product) -> None:
        """Add a rank's part of a decode step, unscaled, without a norm; summed at once."""
        if self.ranks is not None and not self.ranks.leads:
            total_BD.zero_()  # the stream itself is summed, as above
        add_product_(total_BD, added)
        if self.ranks is not None:
            self.ranks.sum_(total_BD)

    def add_product_normed_(self, total_BD: Tensor, added: Product, norm: Norm) -> Quantised:
        """The same, and the sum after the next norm."""
        if self.ranks is None:
            return norm.quantised_sum_(total_BD, added)
        self.add_product_(total_BD, added)
        return norm.quantised(total_BD)
