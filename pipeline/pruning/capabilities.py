"""What a method may be able to do beside pruning; the engine asks with `isinstance`.

A method that lacks one of these says nothing about it, and the engine does without: its rows are answered one
by one, their cost is not foreseen, all its keys and values stay on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.kernels.segments import Segments
from pipeline.pruning.memories.key_memory import KeyMemory, MemoryNeeds
from pipeline.pruning.operations import Passes
from pipeline.pruning.shape import ModelShape
from pipeline.records import Spans


@runtime_checkable
class SharesDocuments(Protocol):
    """Its first layers do the same with a document whatever question stands behind it."""

    def shared_layers(self, shape: ModelShape) -> int:
        """How many leading layers do so.

        There `select` must be one that answers `KEEP_ALL`, or stores nothing: rows with the same document are
        put together behind these layers, and it is not asked. 0 claims nothing.
        """


@runtime_checkable
class ForeseesWork(Protocol):
    """Its cost can be told beforehand: by this it is chosen how rows with one document are answered."""

    def expected_passes(self, shape: ModelShape, length: int) -> Passes:
        """What a prompt of `length` tokens is expected to cost.

        Where attention decides how many tokens are kept, it is `ASSUMED_SHARE` of them.
        """


@dataclass(frozen=True, kw_only=True)
class Rescoring:
    """Where a method judges blocks of tokens again while decoding, so that their K/V may be offloaded.

    At each of `layers` the tokens that entered it are blocks of `block`, of which the last may be shorter.
    Their scores say which of them need their K/V, in the layers since the one before in `layers`, on the
    device. A set that shares at least `gamma` of its blocks with the best ones is used on.
    """

    layers: tuple[int, ...]
    block: int
    gamma: float


@runtime_checkable
class RescoresBlocks(Protocol):
    """Its plan has a `Rescoring`: blocks of K/V may be offloaded to the host and fetched again."""

    def select_decode(self, layer: int, query_Hd: Tensor, state: Any) -> Tensor | None:
        """(N,) scores of the blocks of a layer of the plan's `rescoring`, by a generated token's query.

        Asked only while K/V are offloaded, which happens to one document at a time.
        """


@runtime_checkable
class FixesShares(Protocol):
    """It can keep fixed shares of the prompt: for speed on random weights, whose attention finds nothing."""

    def with_keep(self, shares: tuple[float, ...]) -> Self:
        """These settings with fixed shares to keep, one or one a pruning layer."""


@runtime_checkable
class ChoosesPrecision(Protocol):
    """Its selections may name tokens in `ffn_fp8`, for which the weights must be quantised."""

    @property
    def ffn_in_fp8(self) -> bool:
        """Whether they do, with these settings."""


@runtime_checkable
class ReadsAhead(Protocol):
    """A draft model reads whole prompts first; the model computes only the tokens that are chosen by that.

    They keep their original positions. Runs with such a method need a draft with the model's tokenizer.
    """

    @property
    def look_ahead(self) -> int:
        """Tokens that the draft generates behind each prompt, whose attention counts."""

    @property
    def pool(self) -> int:
        """Neighbours that attention is averaged over; odd."""

    def windows(self, lengths: Sequence[int], spans: Sequence[Spans]) -> tuple[int, ...]:
        """How many last tokens of each prompt the draft is asked about, too."""

    def most_kept(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """How many tokens `chosen` names at most, of prompts of these lengths."""

    def chosen(self, scores_ST: Tensor, segments: Segments, protected_T: Tensor) -> Tensor:
        """Ascending indices of the pack's tokens that the model computes, `protected_T` (T,) bool among them.

        `scores_ST` are the draft's: of each of S queries, the last tokens as one and the look-ahead tokens,
        the largest attention over heads and layers.
        """


@dataclass(frozen=True, kw_only=True)
class StepSkips:
    """Which feed-forward networks may be left out of decode steps of a row that is decoded alone.

    Where the residual stream before and behind the network of a layer just before one of `layers` has a
    cosine of `threshold` or more, the networks of the next of them are left out, `most` at a time.
    """

    threshold: float
    warm_up: int  # first tokens of an answer, in whose steps all run
    layers: range
    most: int


@runtime_checkable
class SkipsInSteps(Protocol):
    """It leaves feed-forward networks out of decode steps, where each row is decoded alone."""

    def step_skips(self, shape: ModelShape) -> StepSkips:
        """Which ones, in such a model."""


@runtime_checkable
class MapsExits(Protocol):
    """Its tokens stop early, and keys and values of theirs may come from maps in a file (exit_maps.py)."""

    exit_maps: str | None  # the file

    def last_full_layer(self, depth: int) -> int:
        """The last layer that computes all tokens, in a model of `depth` layers."""


def exit_maps_of(method: object, shape: ModelShape) -> tuple[str, int] | None:
    """The file of the maps that a method is to use, and after which layer tokens stop; None without any."""
    if not isinstance(method, MapsExits) or method.exit_maps is None:
        return None
    return method.exit_maps, method.last_full_layer(shape.layers)


@runtime_checkable
class HoldsUnrotatedKeys(Protocol):
    """It holds keys before RoPE in a memory of its own, and gives them positions when they are attended to.

    So it may read documents that are longer than the model's context. It is given a document's prompt in
    chunks, each of which passes all layers before the next, and its `select` is never asked. Its rows are
    prefilled and decoded one by one: they have no packs, groups, CUDA graphs or drafts, several answers to a
    prompt, keys and values in fp8 or in host memory, linear layers in mixed precision, or several GPUs.
    """

    def longest(self, shape: ModelShape) -> int:
        """Tokens of the longest sequence that it reads, prompt and answer together."""

    def chunk_tokens(self, most: int) -> int:
        """Prompt tokens of a chunk, where linear layers run on at most so many at once."""

    def memory(self, needs: MemoryNeeds) -> KeyMemory:
        """An empty memory of one document."""

    def attention_bytes(self, shape: ModelShape, itemsize: int, length: int, chunk: int) -> int:
        """Bytes that attention of `chunk` tokens needs for a moment, of a prompt of `length`."""


def longest_sequence(method: object, shape: ModelShape) -> int:
    """Tokens of the longest sequence that a method reads: the model's context, or more."""
    return method.longest(shape) if isinstance(method, HoldsUnrotatedKeys) else shape.context


def check_memories(method: object, refused: Mapping[str, bool]) -> None:
    """Raise ConfigError for a flag that is given beside a method whose rows run one by one, in a memory each.

    `refused` are the flags that such a method does not go with, and whether they are given.
    """
    if not isinstance(method, HoldsUnrotatedKeys):
        return
    for flag, is_given in refused.items():
        if is_given:
            name = getattr(method, "name", type(method).__name__)
            raise ConfigError(
                f"{flag} and --method {name} exclude each other: it holds each document's keys before RoPE, "
                "in the model's dtype, and answers row by row"
            )


def expected_passes(method: object, shape: ModelShape, length: int) -> Passes | None:
    """What a prompt of `length` tokens is expected to cost; None where the method cannot tell."""
    return method.expected_passes(shape, length) if isinstance(method, ForeseesWork) else None


def step_skips(method: object, shape: ModelShape) -> StepSkips | None:
    """What a method leaves out of decode steps; None for nothing."""
    return method.step_skips(shape) if isinstance(method, SkipsInSteps) else None


def uses_fp8(method: object) -> bool:
    """Whether a method sends tokens through the FFN in fp8 by itself."""
    return isinstance(method, ChoosesPrecision) and method.ffn_in_fp8
