"""transformers' decoder layers, opened up into their parts.

Of its internals only projection.py and building.py know too.

The forward pass of a layer is ours (see layers.py); the weights and modules are transformers'.
Supported families are an allow-list, each tested against stock transformers on small configurations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.errors import ConfigError, ModelError
from pipeline.families.projection import HeldAs, Layer, LinearPrecision, Norm, Projection
from pipeline.kernels.fp8 import MULTIPLE, fp8_available
from pipeline.kernels.fused import Quantised, quantize_rows, rope_, silu_mul, silu_mul_quantized
from pipeline.kernels.kv_fp8 import KvTarget
from pipeline.kernels.step import (
    Product,
    add_product_,
    has_kernels,
    product_silu_mul_quantized,
    rope_and_store_,
)
from pipeline.pruning.shape import PIECE_TOKENS, ModelShape
from pipeline.settings.parse import parse_rope_scaling

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
STEP_ROWS = 256  # up to which fp8 products are faster without their scales

Rope = tuple[Tensor, Tensor]  # cosines and sines, (T, d) each


def check_config(config: PreTrainedConfig) -> None:
    """Raise ModelError, before any weight is loaded, for a model this file cannot open."""
    check_family(config.model_type)
    activation = getattr(config, "hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"activation {activation!r} is not supported (silu is)")
    rope_type = _rope_parameters(config).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        # dynamic and LongRoPE choose frequencies by the longest sequence of a call, so a pack's
        # documents would change each other
        raise ModelError(f"RoPE type {rope_type!r} is not supported; types: {', '.join(ROPE_TYPES)}")
    factor = _rope_parameters(config).get("factor", 1.0) if rope_type != "default" else 1.0
    if not isinstance(factor, (int, float)) or factor < 1:
        raise ModelError(
            f"RoPE type {rope_type!r} has the factor {factor!r}, and it must be a number from 1 on"
        )


def check_family(family: str) -> None:
    """Raise ModelError for a `model_type` this file cannot open."""
    if family not in FAMILIES:
        raise ModelError(f"model family {family!r} is not supported; families: {', '.join(FAMILIES)}")


def _rope_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def shape_of(config: PreTrainedConfig) -> ModelShape:
    """The model's dimensions; a sliding attention window caps the context, below which it changes nothing."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer_types = getattr(config, "layer_types", None)
    slides = "sliding_attention" in layer_types if layer_types else True
    window = getattr(config, "sliding_window", None) if slides else None
    context = _context(config)
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab=config.vocab_size,
        context=min(context, window or context),
    )


def _context(config: PreTrainedConfig) -> int:
    """The longest sequence that the configuration's RoPE is made for.

    With YaRN this is what the factor makes of the original context. Model cards tell to add the scaling and
    to leave max_position_embeddings as it was; where it is the longer one already, it stands. The other types
    leave it to max_position_embeddings: Llama 3's is no product of its parameters, and of a linear factor
    nobody can say whether it is in it already.
    """
    own: int = config.max_position_embeddings
    scaling = _rope_parameters(config)
    if scaling.get("rope_type") != "yarn":
        return own
    return max(own, int(scaling["factor"] * scaling["original_max_position_embeddings"]))


def with_rope_scaling(config: PreTrainedConfig, spec: str) -> PreTrainedConfig:
    """The configuration with YaRN (arXiv 2309.00071) over a context that grows by the factor of `spec`.

    As model cards tell to write it by hand: `yarn:FACTOR` over the configuration's own context, or
    `yarn:FACTOR:ORIGINAL` over the one that the model was trained on, where the configuration says more.
    Raises ModelError for a model that scales already, or whose context would not grow.
    """
    factor, original = parse_rope_scaling(spec)
    parameters = _rope_parameters(config)
    if parameters.get("rope_type", "default") != "default" or "rope_theta" not in parameters:
        raise ModelError(
            f"--rope-scaling {spec}: the model's configuration scales its RoPE already"
            f" ({_scaling_in_words(config)}), and the two cannot be combined; leave the flag out, or take the"
            " scaling out of the configuration"
        )
    own = config.max_position_embeddings
    if original is not None and original > own:
        raise ModelError(f"--rope-scaling {spec}: the model's context is {own:,}, less than {original:,}")
    scaled = copy.deepcopy(config)
    scaled.rope_parameters = {
        **parameters,
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original or own,
    }
    scaled.max_position_embeddings = int(factor * (original or own))
    before, after = shape_of(config).context, shape_of(scaled).context
    if after <= before:
        raise ModelError(
            f"--rope-scaling {spec}: the context would be {after:,} tokens, and is {before:,} without it;"
            " give a larger factor, or leave the flag out where a sliding attention window is the limit"
        )
    return scaled


def _scaling_in_words(config: PreTrainedConfig) -> str:
    """As `yarn, factor 4 over 32,768 tokens: a context of 131,072`."""
    parameters = _rope_parameters(config)
    factor, original = parameters.get("factor"), parameters.get("original_max_position_embeddings")
    words = str(parameters.get("rope_type", "a type without rope_theta"))
    words += f", factor {factor:g}" if factor else ""
    words += f" over {original:,} tokens" if original else ""
    return f"{words}: a context of {shape_of(config).context:,}"


def check_fp8(device: torch.device, dtype: torch.dtype, shape: ModelShape) -> None:
    """Raise ConfigError, with the reason, where linear layers cannot be computed in fp8."""
    reason = fp8_available(device)
    widths = shape.hidden, shape.ffn, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if reason is None and any(width % MULTIPLE for width in widths):
        reason = f"the sides of its weights, {', '.join(map(str, widths))}, must divide by {MULTIPLE}"
    if reason is None and dtype != torch.bfloat16:
        reason = f"its products are bfloat16, and the model is {str(dtype).removeprefix('torch.')}"
    if reason is not None:
        raise ConfigError(f"fp8 cannot be used here: {reason}")


class Decoder:
    """A loaded model, taken apart. Token tensors are packed: (T, ...), no batch dimension.

    Linear layers run on at most `piece_tokens` tokens at once: what is wider than the residual stream or
    lives for one product is as large as a piece, however many tokens there are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_config(model.config)
        self.model = model
        self.shape = shape_of(model.config)
        self._body: Any = model.model
        scaling = self._body.layers[0].self_attn.scaling
        if abs(scaling - self.shape.head_dim**-0.5) > 1e-6:
            raise ModelError(f"attention scaling {scaling} is not supported (1/sqrt(head size) is)")
        with torch.no_grad():
            self._layers = [Layer(block) for block in self._body.layers]
        self._last_norm = Norm(self._body.norm)
        self.linears = "auto"  # of `LINEAR_DTYPES`, among those that `use_linears` was asked for
        self.piece_tokens: int = PIECE_TOKENS

    @property
    def device(self) -> torch.device:
        return self._body.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._body.embed_tokens.weight.dtype

    @property
    def linears_in_fp8(self) -> bool:
        """Whether all linear layers are, of all tokens."""
        return self.linears == "fp8"

    def use_linears(self, linears: str, *, ffn: bool = False, keep: bool = False) -> None:
        """Compute linear layers as `linears` says, one of `LINEAR_DTYPES`.

        `auto` is the model's dtype. `fp8` are all layers but the head, of all tokens; `mixed` those behind
        attention and of the FFN, in a prefill, but for the tokens that it is told to keep. `ffn` makes the
        FFN able to do both; `keep` keeps weights that are not needed any more. Raises ConfigError on a
        device that cannot.
        """
        wanted = LinearPrecision(linears=linears, ffn=ffn)
        if wanted.uses_fp8:
            check_fp8(self.device, self.dtype, self.shape)
        for layer in self._layers:
            for name, projection in layer.projections.items():
                form = wanted.form(name)
                if form is not HeldAs.FULL:
                    projection.quantise(keep=keep or form is HeldAs.BOTH)
        self.linears = linears

    def embed(self, ids_T: Tensor) -> Tensor:
        """(T, D) start of the residual stream."""
        return self._body.embed_tokens(ids_T)

    def rope(self, hidden_TD: Tensor, positions_T: Tensor) -> Rope:
        """Rotary embedding of original positions."""
        cos_1Td, sin_1Td = self._body.rotary_emb(hidden_TD, positions_T[None])
        return cos_1Td[0], sin_1Td[0]

    def pieces(self, tokens: int) -> list[slice]:
        """Of so many tokens, in order, as few pieces as `piece_tokens` allows, of about the same size."""
        size = max(1, -(-tokens // max(1, -(-tokens // self.piece_tokens))))
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def qkv(self, layer: int, hidden_TD: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (T, H, d), keys and values (T, K, d), the first two with RoPE."""
        return self._heads(layer, hidden_TD, rope, self._layers[layer].qkv, self.shape.heads)

    def keys_values(self, layer: int, hidden_TD: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Keys, with RoPE, and values (T, K, d), without the queries' share of the projection."""
        projection = self._layers[layer].qkv.part(slice(self.shape.heads * self.shape.head_dim, None))
        _, k_TKd, v_TKd = self._heads(layer, hidden_TD, rope, projection, 0)
        return k_TKd, v_TKd

    def add_attention_(
        self, layer: int, hidden_TD: Tensor, attended_THd: Tensor, fp8: bool | None = None
    ) -> None:
        """Add the projected outputs of the heads to the residual stream, in fp8 if asked or by default."""
        fp8 = self.linears_in_fp8 if fp8 is None else fp8
        projection = self._layers[layer].output
        for rows in self.pieces(len(hidden_TD)):
            own_TD, attended_TN = hidden_TD[rows], attended_THd[rows].flatten(1)
            if fp8:
                own_TD += projection.in_fp8(*quantize_rows(attended_TN))
            else:
                projection.add_to_(own_TD, attended_TN)

    def add_feed_forward_(self, layer: int, hidden_TD: Tensor, fp8: bool | None = None) -> None:
        """Add norm and gated FFN to the residual stream, in fp8 if asked or by default."""
        fp8 = self.linears_in_fp8 if fp8 is None else fp8
        for rows in self.pieces(len(hidden_TD)):
            self._add_feed_forward_(self._layers[layer], hidden_TD[rows], fp8=fp8)

    def step_layer_(
        self,
        layer: int,
        hidden_BD: Tensor,
        rope: Rope,
        target: KvTarget,
        attend: Callable[[Tensor], Tensor],
        normed: Quantised | None = None,
    ) -> Quantised | None:
        """Run a layer for one new token of each row, on the residual stream in place.

        The tokens' keys and values go to the `target`, and then `attend` mixes values for their
        queries, (B, H, d) both. Where that saves a kernel the layer also norms its result for the next one:
        what is returned may be given to it as `normed`, if the stream is left as it is in between.
        """
        weights = self._layers[layer]
        if not self._steps_by_kernels(weights, hidden_BD):
            q_BHd, k_BKd, v_BKd = self.qkv(layer, hidden_BD, rope)
            target.put(k_BKd, v_BKd)
            self.add_attention_(layer, hidden_BD, attend(q_BHd))
            self.add_feed_forward_(layer, hidden_BD)
            return None

        def mixed(qkv: Product) -> Tensor:
            return attend(rope_and_store_(qkv, *rope, target))

        if self.linears_in_fp8:
            return self._step_in_fp8_(layer, hidden_BD, mixed, normed)
        qkv_BN = weights.qkv(weights.input_norm(hidden_BD))
        self.add_attention_(layer, hidden_BD, mixed(Product(qkv_BN)))
        self.add_feed_forward_(layer, hidden_BD)
        return None

    def _steps_by_kernels(self, weights: Layer, hidden_BD: Tensor) -> bool:
        """Whether a step can run as the kernels for it want: in bfloat16, without norms of single heads."""
        few = len(hidden_BD) <= STEP_ROWS or not self.linears_in_fp8
        plain = hidden_BD.dtype == torch.bfloat16 and weights.q_norm is None
        return few and plain and has_kernels(hidden_BD)

    def _step_in_fp8_(
        self,
        layer: int,
        hidden_BD: Tensor,
        mixed: Callable[[Product], Tensor],
        normed: Quantised | None,
    ) -> Quantised | None:
        """`step_layer_` with products whose scales are applied by the kernels between them."""
        weights, last = self._layers[layer], layer + 1 == len(self._layers)
        if normed is None:
            normed = weights.input_norm.quantised(hidden_BD)
        attended_BHd = mixed(weights.qkv.unscaled(normed))
        attended = weights.output.unscaled(quantize_rows(attended_BHd.flatten(1)))
        normed = weights.ffn_norm.quantised_sum_(hidden_BD, attended)
        gated = product_silu_mul_quantized(weights.gate_up.unscaled(normed))
        fed_forward = weights.down.unscaled(gated)
        if last:
            add_product_(hidden_BD, fed_forward)
            return None
        return self._layers[layer + 1].input_norm.quantised_sum_(hidden_BD, fed_forward)

    def head(self, hidden_BD: Tensor) -> Tensor:
        """(B, vocabulary) logits in the model's dtype, whose order is that of `logits`, ties included."""
        head: Any = self.model.lm_head
        return head(self._last_norm(hidden_BD))

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """(B, vocabulary) float32."""
        return self.head(hidden_BD).float()

    def _heads(
        self, layer: int, hidden_TD: Tensor, rope: Rope, projection: Projection, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(T, H, d), (T, K, d), (T, K, d) of a projection with so many heads of queries, perhaps none."""
        weights, tokens = self._layers[layer], len(hidden_TD)
        if tokens <= self.piece_tokens:
            return self._heads_of_piece(weights, hidden_TD, rope, projection, heads)
        joined_TN = hidden_TD.new_empty(tokens, projection.outputs)
        for rows in self.pieces(tokens):
            own_rope = rope[0][rows], rope[1][rows]
            out_TN = joined_TN[rows]
            made = self._heads_of_piece(weights, hidden_TD[rows], own_rope, projection, heads, out_TN)
            if weights.k_norm is not None:  # queries and keys were not normed in place
                for source_TNd, target_TNd in zip(made[:2], self._split(out_TN, heads)[:2], strict=True):
                    target_TNd.copy_(source_TNd)
        return self._split(joined_TN, heads)

    def _heads_of_piece(
        self,
        weights: Layer,
        hidden_TD: Tensor,
        rope: Rope,
        projection: Projection,
        heads: int,
        out_TN: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of few tokens; their projection is written to `out_TN` if there is one."""
        heads_TN = self._normed(
            hidden_TD, weights.input_norm, projection, fp8=self.linears_in_fp8, out_TN=out_TN
        )
        q_THd, k_TKd, v_TKd = self._split(heads_TN, heads)
        if weights.k_norm is not None:
            q_THd = weights.q_norm(q_THd) if heads and weights.q_norm else q_THd
            k_TKd = weights.k_norm(k_TKd)
        rope_(q_THd, k_TKd, *rope)
        return q_THd, k_TKd, v_TKd

    def _split(self, heads_TN: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views of queries, keys and values."""
        kv_heads = self.shape.kv_heads
        heads_TNd = heads_TN.unflatten(-1, (-1, self.shape.head_dim))
        q_THd, k_TKd, v_TKd = heads_TNd.split((heads, kv_heads, kv_heads), dim=1)
        return q_THd, k_TKd, v_TKd

    def _add_feed_forward_(self, weights: Layer, hidden_TD: Tensor, *, fp8: bool) -> None:
        """See `add_feed_forward_`, of few tokens."""
        gate_up_T2F = self._normed(hidden_TD, weights.ffn_norm, weights.gate_up, fp8=fp8)
        if fp8:
            hidden_TD += weights.down.in_fp8(*silu_mul_quantized(gate_up_T2F))
        else:
            weights.down.add_to_(hidden_TD, silu_mul(gate_up_T2F))

    def _normed(
        self,
        hidden_TD: Tensor,
        norm: Norm,
        projection: Projection,
        *,
        fp8: bool,
        out_TN: Tensor | None = None,
    ) -> Tensor:
        """(T, N) a projection of the normed residual stream; written to `out_TN` if there is one."""
        if fp8:
            return projection.in_fp8(*norm.quantised(hidden_TD), out_TN)
        return projection(norm(hidden_TD), out_TN)
