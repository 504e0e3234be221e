"""The feed-forward networks of a prefill, for the tokens that a method selects, each in its precision."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.model.precision import Kept
from pipeline.pruning.base import Selection


def feed_forward(
    decoder: Decoder,
    layer: int,
    hidden_TD: Tensor,
    selection: Selection,
    kept: Kept | None,
    pieces: Sequence[tuple[slice, Kept | None]],
    read_B: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Take the tokens selected through the network: those (None: all) by default, and those in fp8.

    Of them only `read_B`, if that is given: what becomes of the others is not read. `kept` are the tokens
    that keep the model's dtype, and `pieces` has them of each piece of the pack.
    """
    ffn, ffn_fp8 = selection.live if selection.ffn is None else selection.ffn, selection.ffn_fp8
    if read_B is not None:
        ffn = read_B if ffn is None else ffn[torch.isin(ffn, read_B)]
        ffn_fp8 = None if ffn_fp8 is None else ffn_fp8[torch.isin(ffn_fp8, read_B)]
    if ffn is not None and len(ffn) == len(hidden_TD):
        ffn = None
    if ffn_fp8 is None and kept is not None:
        own, others = kept.split(ffn)
        if ffn is None:
            for rows, of_piece in pieces:
                assert of_piece is not None
                of_piece.in_both_(partial(decoder.add_feed_forward_, layer), hidden_TD[rows])
            return own, others
        ffn, ffn_fp8 = own, others
    if ffn_fp8 is None:
        feed_forward_(decoder, layer, hidden_TD, ffn)
    else:
        feed_forward_(decoder, layer, hidden_TD, ffn, fp8=False)
        feed_forward_(decoder, layer, hidden_TD, ffn_fp8, fp8=True)
    return ffn, ffn_fp8


def feed_forward_(
    decoder: Decoder,
    layer: int,
    hidden_TD: Tensor,
    passes: Tensor | None,
    fp8: bool | None = None,
) -> None:
    """Add the feed-forward network's output in place, for the tokens `passes` (None: all).

    The network and its norm run on the gathered tokens alone, a piece at a time; the rows of the others are
    not touched. `fp8` says in which precision, None in that of all linear layers.
    """
    if passes is None:
        decoder.add_feed_forward_(layer, hidden_TD, fp8)
        return
    for rows in decoder.pieces(len(passes)):
        chosen_C = passes[rows]
        chosen_CD = hidden_TD.index_select(0, chosen_C)
        decoder.add_feed_forward_(layer, chosen_CD, fp8)
        hidden_TD.index_copy_(0, chosen_C, chosen_CD)
