"""Masks of the tokens that rows may go on with, on the device, and how likely tokens are.

A step of rows with a form comes in two halves: the model's logits, and the choice among them. While the
device is busy with the first the host learns which tokens the last step made, and fills the masks.
Letters: A tokens whose logits are asked for, B rows, C columns of a batch, V vocabulary, W words of 32 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.generation.guide import Guide, fill_guided

ROWS_AT_ONCE = 32  # of those whose probabilities are computed: they take a float32 of the whole vocabulary


class _Tables(NamedTuple):
    """What the host fills, page-locked where there is a GPU, and where it lies on the device."""

    host_mask_CW: Tensor
    mask_CW: Tensor
    host_asked_CA: Tensor
    asked_CA: Tensor
    logits_CV: Tensor


class MaskTable:
    """Of each column the tokens that its row may go on with, and its logits between the halves of a step.

    Takes no memory before the first row with a form.
    """

    def __init__(self, decoder: Decoder, capacity: int, asked: int) -> None:
        """Up to so many tokens of a column may be `asked` for."""
        self._decoder, self._capacity, self._asked = decoder, capacity, asked
        self._made: _Tables | None = None

    def make(self, words: int) -> None:
        """Have tables for masks of so many words."""
        if self._made is not None and self._made.mask_CW.shape[1] == words:
            return
        count, device, vocab = self._capacity, self._decoder.device, self._decoder.shape.vocab
        pinned = device.type == "cuda"
        host_mask_CW = torch.full((count, words), -1, dtype=torch.int32, pin_memory=pinned)
        host_asked_CA = torch.zeros((count, self._asked), dtype=torch.int64, pin_memory=pinned)
        self._made = _Tables(
            host_mask_CW=host_mask_CW,
            mask_CW=host_mask_CW.to(device),
            host_asked_CA=host_asked_CA,
            asked_CA=host_asked_CA.to(device),
            logits_CV=torch.zeros((count, vocab), dtype=self._decoder.dtype, device=device),
        )

    @property
    def _tables(self) -> _Tables:
        assert self._made is not None, "no table was made for rows with a form"
        return self._made

    def fill(self, guides: Sequence[Guide | None], asked: Sequence[Sequence[int]], columns: int) -> None:
        """Bring the masks of the next choice to the device, of which so many columns are looked at.

        None stands for a row that may go on with any token; `asked` are the tokens of each row whose logits
        are wanted, if it has any. What was copied before must have arrived.
        """
        tables = self._tables
        mask_CW, asked_CA = tables.host_mask_CW.numpy(), tables.host_asked_CA.numpy()
        fill_guided(guides, mask_CW[:columns])
        for column, tokens in enumerate(asked if self._asked else ()):
            asked_CA[column, : len(tokens)] = tokens
        tables.mask_CW[:columns].copy_(tables.host_mask_CW[:columns], non_blocking=True)
        if self._asked:
            tables.asked_CA[:columns].copy_(tables.host_asked_CA[:columns], non_blocking=True)

    def hold(self, logits_BV: Tensor) -> None:
        """Keep the logits of a step's first half."""
        self._tables.logits_CV[: len(logits_BV)] = logits_BV

    def held(self, columns: int) -> Tensor:
        """(B, V) logits that were kept."""
        return self._tables.logits_CV[:columns]

    def applied(self, logits_BV: Tensor) -> Tensor:
        """Logits without those of tokens that may not follow."""
        return masked(logits_BV, self._tables.mask_CW[: len(logits_BV)])

    def asked_logits(self, logits_BV: Tensor, scores_BX: Tensor) -> None:
        """Write the logits of the tokens that were asked for to the last columns of `scores_BX`."""
        if self._asked:
            asked_BA = self._tables.asked_CA[: len(logits_BV)]
            scores_BX[:, -self._asked :] = logits_BV.gather(1, asked_BA).float()


def masked(logits_BV: Tensor, mask_BW: Tensor) -> Tensor:
    """The logits, with minus infinity for the tokens whose bit is not set, of a word's the lowest first."""
    bits_8 = 1 << torch.arange(8, dtype=torch.uint8, device=mask_BW.device)
    is_out_BV = ((mask_BW.view(torch.uint8)[:, :, None] & bits_8) == 0).flatten(1)[:, : logits_BV.shape[1]]
    return logits_BV.masked_fill(is_out_BV, -torch.inf)


def logprobs_of(logits_BV: Tensor, tokens_B: Tensor) -> Tensor:
    """(B,) the natural logarithm of each token's probability; of one that is none, below 0, of token 0."""
    own_B = logits_BV.gather(1, tokens_B.clamp(min=0)[:, None])[:, 0].float()
    totals = [part_BV.float().logsumexp(-1) for part_BV in logits_BV.split(ROWS_AT_ONCE)]
    return own_B - torch.cat(totals)


@torch.inference_mode()
def first_allowed(logits_BV: Tensor, guides: Sequence[Guide | None]) -> Tensor:
    """The logits of prompts' last tokens, without those of tokens with which no answer may begin."""
    words = next((len(guide.stops_W) for guide in guides if guide is not None), None)
    if words is None:
        return logits_BV
    mask_BW = np.empty((len(guides), words), np.int32)
    fill_guided(guides, mask_BW)
    return masked(logits_BV, torch.from_numpy(mask_BW).to(logits_BV.device))


@torch.inference_mode()
def first_scores(
    logits_BV: Tensor, tokens: Sequence[int], guides: Sequence[Guide | None]
) -> list[list[float]]:
    """Of each row the log-probability of its first token, and the logits of those that its guide asks for."""
    logprobs = logprobs_of(logits_BV, torch.tensor(tokens, device=logits_BV.device)).tolist()
    asked = [[] if guide is None else guide.asked for guide in guides]
    return [
        [logprob, *(logits_V[tokens].float().tolist() if tokens else ())]
        for logprob, logits_V, tokens in zip(logprobs, logits_BV, asked, strict=True)
    ]
