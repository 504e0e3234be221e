"""A tiny model with random weights, and documents for it: what the probes compute on."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.checkpoints.building import random_model
from pipeline.families.decoder import Decoder
from pipeline.kernels.attention import AttentionBackend
from pipeline.kernels.devices import pick_device, pick_dtype, use_device
from pipeline.model.loading import attention_for
from pipeline.model.prefill import Pack, Prefilled, prefill
from pipeline.pruning.base import PruningMethod
from pipeline.records import EncodedDocument, Row, Spans

LAYERS = 4
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
SHARPER = 6  # times larger weights: those of 0.02 make attention nearly uniform, and pruning a matter of luck
LENGTHS = (150, 9, 64)  # tokens of the documents


class Subject(NamedTuple):
    """A model on the device of `--device auto`, and how it attends."""

    decoder: Decoder
    attention: AttentionBackend

    def prefill(self, method: PruningMethod, new_tokens: int = 0) -> Prefilled:
        """Of the documents."""
        return prefill(self.decoder, self.attention, method, self.pack(), new_tokens)

    def pack(self) -> Pack:
        """Documents of random tokens, the same for every subject."""
        return Pack.of(self.documents, self.decoder.device)

    @property
    def documents(self) -> list[EncodedDocument]:
        return [_document(n, tokens) for n, tokens in enumerate(LENGTHS)]


def device() -> torch.device:
    """That of `--device auto`."""
    return use_device(pick_device("auto"))


@cache
def subject(dtype: str = "auto") -> Subject:
    """The same weights in whatever dtype; raises ConfigError where no attention backend can compute in it."""
    target = device()
    drawn = random_model("qwen2", SIZES, device=torch.device("cpu"), dtype=torch.float32)
    # not `drawn` itself, cast: its rotary frequencies, which stay in float32, would be cast with it
    model = random_model("qwen2", SIZES, device=target, dtype=pick_dtype(dtype, target))
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), drawn.parameters(), strict=True):
            parameter.copy_(weight * SHARPER if weight.dim() > 1 else weight)
    decoder = Decoder(model)
    return Subject(decoder, attention_for("auto", target, decoder.dtype, decoder.shape)[0])


@cache
@torch.inference_mode()
def stock_logits() -> Tensor:
    """(B, vocabulary) of transformers' own forward pass in float32, a document at a time."""
    decoder = subject("float32").decoder
    documents = [_document(n, tokens) for n, tokens in enumerate(LENGTHS)]
    ids = [torch.from_numpy(document.input_ids)[None].to(decoder.device) for document in documents]
    return torch.stack([decoder.model(ids_1T).logits[0, -1].float() for ids_1T in ids])


def _document(number: int, tokens: int) -> EncodedDocument:
    ids = np.random.default_rng(number).integers(0, SIZES["vocab_size"], tokens)
    spans = Spans(document=(2, tokens - 5), question=(tokens - 5, tokens - 1))
    return EncodedDocument(
        source=Row(row=number, id=str(number), place=f"document {number}"), input_ids=ids, spans=spans
    )
