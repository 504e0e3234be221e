"""A tiny model whose every token follows from the one before, so that a test knows what it writes."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from conftest import SIZES
from prompt_parts import CHATML, byte_tokenizer
from tokenizers import AddedToken

from pipeline.checkpoints.building import random_model

OPENS, CLOSES, END = "<think>", "</think>", "<|endoftext|>"
SWITCH = "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
# of a model that reasons unless it is told not to, and of one whose prompt begins the reasoning
SWITCHED = f"{CHATML}{SWITCH}{OPENS}\n\n{CLOSES}\n\n{{% endif %}}"
BEGINNING = CHATML.replace("assistant\n", f"assistant\n{OPENS}")
# behind a line break it reasons, behind two it answers
THINKING = ("Ċ", OPENS, "a", "b", "c", CLOSES, "ĊĊ", "d", "e", "f", END)


def tokenizer(*, special: bool = False, **settings):
    """`prompt_parts`' tokenizer with the two marks as tokens, which texts leave out if they are special."""
    made = byte_tokenizer(**settings)
    made.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in (OPENS, CLOSES)])
    return made


def save_chain(
    folder: Path, chain=THINKING, template: str = SWITCHED, context: int = 1024, **settings
) -> Path:
    """A model folder; `chain` are names of tokens, each of which follows the one before it and no other."""
    own = tokenizer(chat_template=template, **settings)
    sizes = {
        **SIZES,
        "vocab_size": len(own),
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
    }
    model = random_model("qwen2", sizes, device=torch.device("cpu"), dtype=torch.float32)
    follows = {
        own.convert_tokens_to_ids(one): own.convert_tokens_to_ids(other) for one, other in pairwise(chain)
    }
    _write(model, follows)
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def _write(model: torch.nn.Module, follows: Mapping[int, int]) -> None:
    """Layers add nothing to an embedding, and the head turns each into what follows it."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = torch.nn.functional.normalize(torch.randn(model.lm_head.weight.shape), dim=-1)
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.zero_()
        for one, other in follows.items():
            model.lm_head.weight[other] = embedding[one]
