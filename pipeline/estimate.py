"""How long a run may take: by the rows that it has done, or by two rates that its device is measured at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from pipeline.bench.timing import best_seconds
from pipeline.checkpoints.device_memory import is_out_of_memory
from pipeline.engines.memory import USABLE, Packer, memory_message
from pipeline.model.loading import UnloadedModel
from pipeline.pruning.capabilities import ReadsAhead, expected_passes
from pipeline.pruning.operations import dense_flops, layer_weights, passes_flops, whole_layers
from pipeline.pruning.shape import ModelShape
from pipeline.records import EncodedDocument
from pipeline.texts.words import counted, duration

if TYPE_CHECKING:
    from pipeline.setup.preparation import Preparation

TRIAL_S = 0.2  # of each rate
# of the rate of a matrix product, what prefills reach: long documents on a GPU, and short ones or a busy CPU
BEST_SHARE, WORST_SHARE = 0.85, 0.4
# columns by which rows that are done tell how fast that was
TIMED = ["status", "group_rows", "prompt_tokens", "flops_ratio", "new_tokens"]
TIMED += ["prefill_ms", "decode_ms", "pack_documents"]
MATRIX_TOKENS = {"cpu": 256, "cuda": 4096}
COPIED_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one device: operations a second of a matrix product, and bytes a second of its memory."""

    matrix: float
    memory: float


@dataclass(kw_only=True)
class Pace:
    """How fast rows were answered that are done, by their columns; not those that shared a document."""

    shape: ModelShape
    n: int = 1  # answers to a prompt, which take their steps together
    rows: int = 0
    flops: float = 0.0  # of their prefills
    prefill_s: float = 0.0  # of a pack's each row has an equal part
    steps: int = 0  # of decoding, counted for each row
    decode_s: float = 0.0  # likewise

    def add(self, table: pa.Table) -> None:
        """Heed the rows of a table, which has the columns `TIMED`."""
        for row in table.select(TIMED).to_pylist():
            if row["status"] != "ok" or row["group_rows"] or not row["pack_documents"]:
                continue
            self.rows += 1
            self.flops += dense_flops(self.shape, row["prompt_tokens"]) * row["flops_ratio"]
            self.prefill_s += row["prefill_ms"] / row["pack_documents"] / 1e3
            self.steps += max(0, round(row["new_tokens"] / self.n) - 1)
            self.decode_s += (row["decode_ms"] or 0.0) / 1e3

    @property
    def says_something(self) -> bool:
        return self.prefill_s > 0 and self.flops > 0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds, loading and warming up left out: of all prefills between two bounds, of decoding at most."""

    prefill_s: tuple[float, float]
    decode_s: float
    new_tokens: int  # of an answer, at most; where rows differ, of them all in the mean
    prefill_at: str  # the rates, in words
    decode_at: str
    rates: dict[str, float]

    def cost(self, price_per_hour: float) -> tuple[float, float]:
        """Between which two amounts: without any decoding, and with all of it."""
        low, high = self.prefill_s
        return low / 3600 * price_per_hour, (high + self.decode_s) / 3600 * price_per_hour

    def as_dict(self) -> dict[str, Any]:
        low, high = self.prefill_s
        return {
            "prefill_s_low": low,
            "prefill_s_high": high,
            "decode_s_at_most": self.decode_s,
            "rates": self.rates,
        }

    def as_text(self) -> str:
        low, high = map(_duration, self.prefill_s)
        prefill = high if low == high else f"{low} to {high}"
        most = "" if self.decode_s < 1 else "up to "
        answers = f"if every answer has {counted(self.new_tokens, 'token')}"
        return (
            f"time, roughly: {prefill} of prefill, at {self.prefill_at}; {most}{_duration(self.decode_s)} of "
            f"decoding, {answers}, at {self.decode_at}; loading comes on top"
        )


@dataclass(kw_only=True)
class PlannedPacks:
    """What packs of a run would need, by arithmetic."""

    weights_bytes: int = 0  # that are to be loaded yet
    packs: int = 0
    largest_pack_tokens: int = 0
    kv_bytes: int = 0  # of the pack that has the most
    prefill_bytes: int = 0  # that the largest prefill needs beside the weights, keys and values included
    too_large: list[str] = field(default_factory=list)  # of each row for which there is no memory, why

    def add(self, tokens: int, kv_bytes: int, prefill_bytes: int = 0) -> None:
        self.packs += 1
        self.largest_pack_tokens = max(self.largest_pack_tokens, tokens)
        self.kv_bytes = max(self.kv_bytes, kv_bytes)
        self.prefill_bytes = max(self.prefill_bytes, prefill_bytes)

    def add_pack(self, packer: Packer, pack: Sequence[EncodedDocument]) -> None:
        """A document that no other runs beside has what the weights leave, or is not tried at all."""
        lengths = [document.prompt_tokens for document in pack]
        if len(pack) > 1 or not packer.runs_alone(pack[0]):
            self.add(sum(lengths), packer.kv_bytes(lengths), packer.planned_bytes(lengths))
            return
        left_bytes = packer.all_bytes - int(self.weights_bytes * USABLE[packer.device.type])
        left = replace(packer, max_bytes=max(0, left_bytes), store_bytes=0)
        self.add(lengths[0], packer.kv_bytes(lengths, packer.kv_itemsize), packer.bytes_alone(pack[0]))
        if left.refuses(pack[0]):
            self.too_large.append(memory_message(pack[0], left))

    def told(self) -> Iterator[str]:
        """Lines of the memory of the largest prefill, and of rows that are too large for what there is."""
        if self.prefill_bytes:
            yield f"memory of the largest prefill: {self.prefill_bytes / 1e9:,.3g} GB beside the weights"
        if self.too_large:
            yield f"too large for the memory: {counted(len(self.too_large), 'row')}, the first:"
            yield f"  {self.too_large[0]}"


def expected_flops(packer: Packer, tokens: int) -> int:
    """Operations of a prefill of so many tokens, as far as its method says what it does, or else of dense."""
    shape, method = packer.shape, packer.method
    passes = expected_passes(method, shape, tokens)
    if isinstance(method, ReadsAhead):
        layers = whole_layers(shape.layers, method.most_kept((tokens,))[0])
        reading = dense_flops(packer.draft or shape, tokens)
        return reading + passes_flops(shape, [method.to_the_end(shape, layers)])
    return dense_flops(shape, tokens) if passes is None else passes_flops(shape, passes)


def planning_packer(run: Preparation) -> Packer:
    """The engine's packer, but with the memory that is free before the weights are loaded."""
    return Packer.on(
        run.model.device,
        run.method,
        run.model.own,
        itemsize=run.model.dtype.itemsize,
        new_tokens=run.config.max_new_tokens,
        n=run.config.n,
        pack_tokens=run.config.pack_tokens,
        kv_memory=run.config.kv_memory,
        kv_itemsize=1 if run.config.kv_dtype == "fp8" else None,
        in_flight=run.config.in_flight,
        cuts_queries=run.model.attention.cuts_queries(run.model.device),
        draft=None if run.model.draft is None else run.model.draft.shape,
        remedies=run.remedies,
    )


def memory_needed(run: Preparation, packer: Packer, longest: int) -> Iterator[str]:
    """What the weights take of the device, and on how many such GPUs a prompt of the longest length fits."""
    model, precision = run.model, run.precision
    memory = model.memory(precision)
    if memory is None or not isinstance(model, UnloadedModel):
        return
    yield str(memory)

    def beside(own: ModelShape) -> int:
        return replace(packer, shape=own).planned_bytes([longest])

    if max(memory.most, memory.held + beside(model.own)) > memory.free:
        count = model.ranks_needed(precision, beside) if run.remedies.more_devices else None
        remedy = "" if count is None else f": {count} such GPUs do, with --tensor-parallel {count}"
        yield f"that does not hold a prompt of {longest:,} tokens beside them{remedy}"


def estimate(packer: Packer, rates: Rates, *, flops: int, answers: int, prompt_tokens: int) -> Estimate:
    """Of answers to prompts of so many tokens, whose prefills take `flops` operations, all together."""
    return Estimate(
        prefill_s=(flops / (BEST_SHARE * rates.matrix), flops / (WORST_SHARE * rates.matrix)),
        decode_s=_decode_s(packer, rates, answers, prompt_tokens),
        new_tokens=packer.new_tokens,
        prefill_at=f"{BEST_SHARE:.0%} to {WORST_SHARE:.0%} of the {rates.matrix / 1e12:.3g} TFLOP/s that a "
        "matrix product reaches on this device",
        decode_at=f"{rates.memory / 1e9:,.3g} GB/s",
        rates={"matrix_tflops": rates.matrix / 1e12, "memory_gb_per_s": rates.memory / 1e9},
    )


def estimate_by_pace(packer: Packer, pace: Pace, *, flops: int, answers: int) -> Estimate:
    """The same, by what rows of the same run took that are done."""
    rate = pace.flops / pace.prefill_s
    step_s = pace.decode_s / pace.steps if pace.steps else 0.0
    steps = -(-answers // packer.in_flight) * packer.new_tokens
    return Estimate(
        prefill_s=(flops / rate, flops / rate),
        decode_s=steps * step_s,
        new_tokens=packer.new_tokens,
        prefill_at=f"the {rate / 1e12:.3g} TFLOP/s of {counted(pace.rows, 'row')} done before",
        decode_at=f"their {step_s * 1e3:,.3g} ms a step",
        rates={"done_tflops": rate / 1e12, "done_step_ms": step_s * 1e3},
    )


def _decode_s(packer: Packer, rates: Rates, answers: int, prompt_tokens: int) -> float:
    """Each step reads the weights that its rows pass, and the keys and values of them all.

    Those of a prompt are read once for all its answers.
    """
    together = min(packer.in_flight, answers)
    shape = packer.shape
    head = shape.hidden * shape.vocab
    read, passed = layer_weights(shape, together) + head, layer_weights(shape, 1) + head
    a_row = packer.kv_bytes([max(1, prompt_tokens // answers)])
    read_s = (read * packer.itemsize + together * a_row) / rates.memory
    computed_s = 2 * passed * together / rates.matrix
    steps = -(-answers // together) * packer.new_tokens
    return steps * max(read_s, computed_s)


@torch.inference_mode()
def measure_rates(device: torch.device, dtype: torch.dtype, shape: ModelShape) -> Rates | None:
    """In a fraction of a second on a GPU, about one on a CPU; None where memory is too short for it."""
    tokens = MATRIX_TOKENS[device.type]
    options: Any = {"device": device, "dtype": dtype}
    try:
        x_TD = torch.zeros(tokens, shape.hidden, **options)
        w_DF = torch.zeros(shape.hidden, shape.ffn, **options)
        matrix_s = best_seconds(lambda: x_TD @ w_DF, device, longest_s=TRIAL_S, fewest=1)
        source = torch.zeros(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
        copy_s = best_seconds(source.clone, device, longest_s=TRIAL_S, fewest=1)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    operations = 2 * tokens * shape.hidden * shape.ffn
    return Rates(matrix=operations / matrix_s, memory=2 * source.numel() / copy_s)


def _duration(seconds: float) -> str:
    return "less than 1 s" if seconds < 1 else duration(seconds)
