"""Which attention backends, precisions and kernels can run here, each tried on small tensors."""

from __future__ import annotations

import torch

from pipeline.bench.attention_speed import attention_shape, available, distance
from pipeline.doctor.findings import Finding
from pipeline.doctor.tiny import device, stock_logits, subject
from pipeline.errors import ConfigError
from pipeline.generation.decode import decode
from pipeline.generation.generated import StopRules
from pipeline.generation.graphs import DecodeStats, recorder_for
from pipeline.kernels.blocks.block_attention import block_sparse_attention, hopper_for
from pipeline.kernels.devices import is_hopper, pick_dtype
from pipeline.kernels.modules import kernels_for
from pipeline.kernels.sparse import BLOCK, BlockLists, choose_blocks
from pipeline.model.loading import attention_for
from pipeline.pruning.dense import Dense

# of stock logits in float32, as `distance` reckons: well above what rounding does in four sharp layers
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.2, "float16": 0.05}
FP8_TOLERANCE = 0.6  # three bits of a mantissa, in every product of those layers
SPARSE_TOKENS, SPARSE_HEADS, SPARSE_HEAD_DIM, SPARSE_MASS = 1031, (4, 2), 64, 0.5
SPARSE_TOLERANCE = 0.01
SAME_BLOCKS = 0.95  # share of them that the estimate in bfloat16 must choose as that in float32
TAKEN = "; what --attention auto takes"
NEW_TOKENS = 40  # enough for a decode step to be captured, and replayed


def attention(name: str) -> Finding:
    """One backend, by the trial that `--attention auto` makes too, on the heads of a 7B model."""
    target, shape = device(), attention_shape("qwen2-7b")
    dtype = pick_dtype("auto", target)
    found, refused = available([name], shape, device=target, dtype=dtype)
    if found:
        dtype_name = str(dtype).removeprefix("torch.")
        chosen = attention_for("auto", target, dtype, shape)[0].name == name
        return Finding("ok", f"agrees with the reference in {dtype_name}{TAKEN if chosen else ''}")
    # the one that needs nothing but torch, and that auto falls back on
    return Finding("broken" if name == "sdpa" else "absent", refused[name])


def precision(dtype: str) -> Finding:
    """A small model's prefill in this dtype, against transformers in float32 on the same device."""
    try:
        logits = subject(dtype).prefill(Dense()).logits_BV
    except ConfigError as error:
        return Finding("absent", str(error))
    return _judged(distance(logits, stock_logits()), TOLERANCES[dtype], "transformers", _speed(dtype))


def _speed(dtype: str) -> str:
    """What a user should know of a dtype that works."""
    target = device()
    if target.type == "cpu":
        return "; the default here" if dtype == "float32" else "; no faster than float32 on most CPUs"
    if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "; emulated on this GPU, so slow: --dtype float16 is faster"
    return "; the default here" if dtype == "bfloat16" else ""


def fp8_linears() -> Finding:
    """`--linear-dtype fp8` on a small model, against transformers in float32."""
    tried = subject("bfloat16")
    try:
        tried.decoder.use_linears("fp8", keep=True)
    except ConfigError as error:
        return Finding("absent", str(error).removeprefix("fp8 cannot be used here: "))
    try:
        logits = tried.prefill(Dense()).logits_BV
    finally:
        tried.decoder.use_linears("auto")
    return _judged(distance(logits, stock_logits()), FP8_TOLERANCE, "transformers")


def sparse_attention() -> Finding:
    """The kernels of block-sparse attention, against plain torch on the CPU with the same blocks."""
    target = device()
    if target.type == "cpu":
        return Finding("absent", "needs a GPU; on a CPU attention is whole")
    heads, kv_heads = SPARSE_HEADS
    generator = torch.Generator().manual_seed(0)
    joined = torch.randn(SPARSE_TOKENS, heads + 2 * kv_heads, SPARSE_HEAD_DIM, generator=generator)
    q, k, v = joined.to(target, torch.bfloat16).split((heads, kv_heads, kv_heads), dim=1)
    if kernels_for(q, "triton_sparse") is None:
        return Finding("absent", "Triton cannot be imported: attention is whole")
    blocks = choose_blocks(q, k, SPARSE_MASS)
    q_host, k_host, v_host = (x.cpu().float() for x in (q, k, v))
    got, wanted = _as_masks(blocks), _as_masks(choose_blocks(q_host, k_host, SPARSE_MASS))
    same = ((got & wanted).sum() / (got | wanted).sum()).item()
    if not same >= SAME_BLOCKS:
        text = f"only {same:.0%} of the blocks chosen are those that the reference chooses"
        return Finding("broken", text, {"same_blocks": same})
    assert blocks.indices is not None
    on_host = BlockLists(blocks.indices.cpu(), blocks.counts.cpu())
    expected = block_sparse_attention(q_host, k_host, v_host, on_host)
    off = distance(block_sparse_attention(q, k, v, blocks).cpu(), expected)
    more = ""
    if is_hopper(target):
        more = "; by the kernel for Hopper"
        if hopper_for(q, k, v, BLOCK) is None:
            more = "; by the slower kernel: that for Hopper needs Triton 3.6 to 3.9"
    return _judged(off, SPARSE_TOLERANCE, "the reference", more)


def _as_masks(blocks: BlockLists) -> torch.Tensor:
    """(H, M, N) bool on the CPU: what is listed."""
    assert blocks.indices is not None
    indices_HMN, counts_HM = blocks.indices.cpu().long(), blocks.counts.cpu()
    count = indices_HMN.shape[-1]
    # entries behind the last valid one are `count`: a column of its own, cut off again
    masks = torch.zeros(*indices_HMN.shape[:-1], count + 1, dtype=torch.bool)
    valid = torch.arange(count) < counts_HM[..., None]
    return masks.scatter_(-1, indices_HMN.masked_fill(~valid, count), True)[..., :count]


def cuda_graphs() -> Finding:
    """Decode steps replayed from a CUDA graph, against the same steps launched one by one."""
    target = device()
    if target.type == "cpu":
        return Finding("absent", "need a GPU")
    tried = subject()
    prefilled = tried.prefill(Dense(), NEW_TOKENS)
    if recorder_for(target, tried.decoder.dtype, tried.decoder.shape.head_dim, tried.attention) is None:
        needed = "need Triton, or FlashAttention-3"
        return Finding("absent", f"{needed}; attention is {tried.attention.name}: each kernel is launched")
    stats, rules = DecodeStats(), StopRules(max_new_tokens=NEW_TOKENS)
    replayed = decode(*tried, prefilled, rules, stats=stats)
    if not stats.replayed_steps:
        return Finding("note", f"a step could not be captured, so each kernel is launched: {stats.failure}")
    launched = decode(*tried, tried.prefill(Dense(), NEW_TOKENS), rules, graphs=False)
    if [answer.tokens for answer in replayed] != [answer.tokens for answer in launched]:
        return Finding("broken", "replayed steps give other tokens than launched ones")
    return Finding("ok", f"{stats.replayed_steps} steps replayed, the same tokens as launched")


def _judged(off: float, tolerance: float, reference: str, more: str = "") -> Finding:
    facts = {"off": off, "tolerance": tolerance}
    if off <= tolerance:
        return Finding("ok", f"within {tolerance:g} of {reference} ({off:.2g}){more}", facts)
    return Finding("broken", f"off {reference} by {off:.3g}, more than {tolerance:g}", facts)
