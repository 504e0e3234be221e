"""transformers' decoder layers, opened up into their parts.

Of its internals only the families' files, layer.py, projection.py and building.py know too.

The forward pass of a layer is ours (see layers.py); the weights and modules are transformers'.
Supported families are an allow-list, each tested against stock transformers on small configurations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import ModelError
from pipeline.families.configuration import check_config, check_fp8, shape_of, slots_of
from pipeline.families.layer import Layer
from pipeline.families.longrope import LongRope
from pipeline.families.projection import HeldAs, LinearPrecision, Norm, Projection
from pipeline.families.rope import Rope, Table
from pipeline.families.slots import ONE_ROPE
from pipeline.families.supported import FAMILIES
from pipeline.kernels.fused import Quantised, gated, quantize_rows, rope_, silu_mul_quantized
from pipeline.kernels.kv_fp8 import KvTarget
from pipeline.kernels.step import (
    Product,
    add_product_,
    has_kernels,
    product_silu_mul_quantized,
    rope_and_store_,
)
from pipeline.pruning.shape import PIECE_TOKENS, QUERY_PIECES

STEP_ROWS = 256  # up to which fp8 products are faster without their scales


class Decoder:
    """A loaded model, taken apart. Token tensors are packed: (T, ...), no batch dimension.

    Linear layers run on at most `piece_tokens` tokens at once: what is wider than the residual stream or
    lives for one product is as large as a piece, however many tokens there are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_config(model.config)
        self.model = model
        self.shape, self._slots = shape_of(model.config), slots_of(model.config)
        self._body: Any = model.model
        # attention is computed with 1/sqrt(d): queries are multiplied by what another scale is of that
        self._query_scale = self._check_scale(model.model.layers) * math.sqrt(self.shape.head_dim)
        family = FAMILIES[model.config.model_type]
        with torch.no_grad():
            self._layers = [family.layer(block, self._slots) for block in self._body.layers]
            self._last_norm = Norm(self._body.norm, self._slots.norm_offset)
        self._long_rope = LongRope.of(model.config, self.device)
        self._has_plain_layers = self._are_plain()
        self.linears = "auto"  # of `LINEAR_DTYPES`, among those that `use_linears` was asked for
        self.piece_tokens: int = PIECE_TOKENS

    def _check_scale(self, blocks: Any) -> float:
        """The attention's scale; raises ModelError where the modules have another than the configuration."""
        scale = self._slots.attention_scale or self.shape.head_dim**-0.5
        for block in blocks:
            if abs(block.self_attn.scaling - scale) > 1e-6:
                raise ModelError(f"attention scaling {block.self_attn.scaling} is not supported ({scale} is)")
        return scale

    def _are_plain(self) -> bool:
        """Whether all layers are what the kernels for decode steps compute."""
        slots, first = self._slots, self._layers[0]
        return (
            (slots.gate, slots.experts, slots.residual_scale) == ("silu", 0, 1)
            and set(slots.ropes) == {ONE_ROPE}
            and math.isclose(self._query_scale, 1)
            and first.q_norm is None
            and first.attention_post_norm is None
            and first.ffn_post_norm is None
            and first.input_norm is not None
            and (slots.norm_offset, slots.query_growth, slots.rotates_part) == (0, None, False)
        )

    @property
    def device(self) -> torch.device:
        return self._body.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._body.embed_tokens.weight.dtype

    @property
    def query_tokens(self) -> int:
        """Tokens whose queries, and what attention makes of them, a prefill holds at once."""
        return QUERY_PIECES * self.piece_tokens

    @property
    def linears_in_fp8(self) -> bool:
        """Whether all linear layers are, of all tokens."""
        return self.linears == "fp8"

    def use_linears(self, linears: str, *, ffn: bool = False, keep: bool = False) -> None:
        """Compute linear layers as `linears` says, one of `LINEAR_DTYPES`.

        `auto` is the model's dtype. `fp8` are all layers but the head, of all tokens; `mixed` all but the
        head and most queries, keys and values (`QKV_DEPTHS`), in a prefill, but for the tokens that it is
        told to keep, and experts, of all tokens. `ffn` makes the FFN able to do both; `keep` keeps weights
        that are not needed any more.
        Raises ConfigError on a device that cannot.
        """
        wanted = LinearPrecision(linears=linears, ffn=ffn)
        if wanted.uses_fp8:
            check_fp8(self.device, self.dtype, self.shape)
        for place, layer in enumerate(self._layers):
            for name, projection in layer.projections.items():
                form = wanted.form(name, self.depth_of(place))
                if form is not HeldAs.FULL:
                    projection.quantise(keep=keep or form is HeldAs.BOTH)
        self.linears = linears

    def embed(self, ids_T: Tensor) -> Tensor:
        """(T, D) start of the residual stream."""
        hidden_TD: Tensor = self._body.embed_tokens(ids_T)
        scale = self._slots.embedding_scale
        return hidden_TD if scale == 1 else hidden_TD.mul_(scale)

    def rope(self, hidden_TD: Tensor, positions_T: Tensor, reach_T: Tensor | None = None) -> Rope:
        """Rotary embeddings of original positions, in documents that may come to have `reach_T` tokens.

        Where queries grow with their position, by 1 + beta * log(1 + the number of whole stretches of some
        length before it), the two are the slot's (Llama 4's rule).
        """
        tables = {
            kind: self._rope_table(kind, hidden_TD, positions_T, reach_T)
            for kind in dict.fromkeys(self._slots.ropes)
            if kind is not None
        }
        if self._slots.query_growth is None:
            return Rope(tables=tables)
        beta, length = self._slots.query_growth
        scale_T = 1 + beta * torch.log1p(torch.floor(positions_T / length))
        return Rope(tables=tables, query_scale_T=scale_T.to(hidden_TD.dtype))

    def _rope_table(self, kind: str, hidden_TD: Tensor, positions_T: Tensor, reach_T: Tensor | None) -> Table:
        if self._long_rope is not None:
            assert reach_T is not None, "LongRoPE, of documents whose lengths are not told"
            return self._long_rope.table(positions_T, reach_T, hidden_TD.dtype)
        of_kind = () if kind == ONE_ROPE else (kind,)
        (cos_Td,), (sin_Td,) = self._body.rotary_emb(hidden_TD, positions_T[None], *of_kind)
        if self._slots.rope_by_halves:
            return torch.cat((cos_Td, cos_Td), dim=-1), torch.cat((sin_Td, sin_Td), dim=-1)
        return cos_Td, sin_Td

    def sinks(self, layer: int) -> Tensor | None:
        """(H,) float32 of a layer's heads, where they have sinks: see kernels/attention.py."""
        return self._layers[layer].sinks_H

    def pieces(self, tokens: int) -> list[slice]:
        """Of so many tokens, in order, as few pieces as `piece_tokens` allows, of about the same size."""
        size = max(1, -(-tokens // max(1, -(-tokens // self.piece_tokens))))
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def qkv(
        self, layer: int, hidden_TD: Tensor, rope: Rope, fp8: bool | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (T, H, d), keys and values (T, K, d), the first two with RoPE, in fp8 if asked."""
        heads = (self.shape.heads, self.shape.kv_heads)
        return self._heads(layer, hidden_TD, rope, self._layers[layer].qkv, heads, fp8)

    def queries(self, layer: int, hidden_TD: Tensor, rope: Rope, fp8: bool | None = None) -> tuple[Tensor]:
        """(T, H, d) with RoPE, without the share of the projection that keys and values have."""
        heads = self.shape.heads
        projection = self._layers[layer].qkv.part(slice(0, heads * self.shape.head_dim))
        return self._heads(layer, hidden_TD, rope, projection, (heads, 0), fp8)[:1]

    def has_qkv_in_fp8(self, layer: int) -> bool:
        """Whether `mixed` has a layer's queries, keys and values in fp8, of tokens that are not kept."""
        return (
            LinearPrecision(linears=self.linears).form("self_attn.qkv_proj", self.depth_of(layer))
            is HeldAs.BOTH
        )

    def depth_of(self, layer: int) -> float:
        """From 0 to less than 1."""
        return layer / self.shape.layers

    def keys_values(
        self, layer: int, hidden_TD: Tensor, rope: Rope, fp8: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys, with RoPE, and values (T, K, d), without the queries' share of the projection."""
        projection = self._layers[layer].qkv.part(slice(self.shape.heads * self.shape.head_dim, None))
        return self._heads(layer, hidden_TD, rope, projection, (0, self.shape.kv_heads), fp8)[1:]

    def add_attention_(
        self, layer: int, hidden_TD: Tensor, attended_THd: Tensor, fp8: bool | None = None
    ) -> None:
        """Add the projected outputs of the heads to the residual stream, in fp8 if asked or by default."""
        fp8 = self.linears_in_fp8 if fp8 is None else fp8
        weights = self._layers[layer]
        for rows in self.pieces(len(hidden_TD)):
            attended_TN = attended_THd[rows].flatten(1)
            given = quantize_rows(attended_TN) if fp8 else attended_TN
            self._add_projected_(hidden_TD[rows], weights.output, given, weights.attention_post_norm)

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
        table = rope.of(self._slots.ropes[layer])
        if table is None or not self._steps_by_kernels(hidden_BD):
            q_BHd, k_BKd, v_BKd = self.qkv(layer, hidden_BD, rope)
            target.put(k_BKd, v_BKd)
            self.add_attention_(layer, hidden_BD, attend(q_BHd))
            self.add_feed_forward_(layer, hidden_BD)
            return None

        def mixed(qkv: Product) -> Tensor:
            return attend(rope_and_store_(qkv, *table, target))

        if self.linears_in_fp8:
            return self._step_in_fp8_(layer, hidden_BD, mixed, normed)
        qkv_BN = self._normed(hidden_BD, weights.input_norm, weights.qkv, fp8=False)
        self.add_attention_(layer, hidden_BD, mixed(Product(qkv_BN)))
        self.add_feed_forward_(layer, hidden_BD)
        return None

    def _steps_by_kernels(self, hidden_BD: Tensor) -> bool:
        """Whether a step can run as the kernels for it want: in bfloat16, and in plain layers."""
        few = len(hidden_BD) <= STEP_ROWS or not self.linears_in_fp8
        plain = hidden_BD.dtype == torch.bfloat16 and self._has_plain_layers
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
        assert weights.gate_up is not None
        assert weights.down is not None
        assert weights.input_norm is not None
        assert weights.ffn_norm is not None
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
        next_norm = self._layers[layer + 1].input_norm
        assert next_norm is not None
        return next_norm.quantised_sum_(hidden_BD, fed_forward)

    def head(self, hidden_BD: Tensor) -> Tensor:
        """(B, vocabulary) logits in the model's dtype, whose order is that of `logits`, ties included."""
        head: Any = self.model.lm_head
        logits_BV, scale = head(self._last_norm(hidden_BD)), self._slots.logits_scale
        return logits_BV if scale == 1 else logits_BV * scale

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """(B, vocabulary) float32."""
        return self.head(hidden_BD).float()

    def _heads(
        self,
        layer: int,
        hidden_TD: Tensor,
        rope: Rope,
        projection: Projection,
        heads: tuple[int, int],
        fp8: bool | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(T, H, d), (T, K, d), (T, K, d) of a projection with so many heads of queries and of keys."""
        weights, tokens = self._layers[layer], len(hidden_TD)
        fp8 = self.linears_in_fp8 if fp8 is None else fp8
        if tokens <= self.piece_tokens:
            return self._heads_of_piece(layer, hidden_TD, rope, projection, heads, fp8)
        joined_TN = hidden_TD.new_empty(tokens, projection.outputs)
        for rows in self.pieces(tokens):
            out_TN = joined_TN[rows]
            made = self._heads_of_piece(layer, hidden_TD[rows], rope.at(rows), projection, heads, fp8, out_TN)
            if weights.k_norm is not None:  # queries and keys were not normed in place
                for source_TNd, target_TNd in zip(made[:2], self._split(out_TN, heads)[:2], strict=True):
                    target_TNd.copy_(source_TNd)
        return self._split(joined_TN, heads)

    def _heads_of_piece(
        self,
        layer: int,
        hidden_TD: Tensor,
        rope: Rope,
        projection: Projection,
        heads: tuple[int, int],
        fp8: bool,
        out_TN: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of few tokens; their projection is written to `out_TN` if there is one."""
        weights, table = self._layers[layer], rope.of(self._slots.ropes[layer])
        heads_TN = self._normed(hidden_TD, weights.input_norm, projection, fp8=fp8, out_TN=out_TN)
        q_THd, k_TKd, v_TKd = self._split(heads_TN, heads)
        if weights.k_norm is not None:
            q_THd = weights.q_norm.of_heads(q_THd) if heads[0] and weights.q_norm else q_THd
            k_TKd = weights.k_norm.of_heads(k_TKd) if heads[1] else k_TKd
        if table is not None:
            turned = slice(0, table[0].shape[-1])
            rope_(q_THd[..., turned], k_TKd[..., turned], *table)
        if heads[0] and not math.isclose(self._query_scale, 1):
            q_THd.mul_(self._query_scale)
        if heads[0] and rope.query_scale_T is not None:
            q_THd.mul_(rope.query_scale_T[:, None, None])
        return q_THd, k_TKd, v_TKd

    def _split(self, heads_TN: Tensor, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Views of queries, keys and values, of so many heads of the first and of the others."""
        heads_TNd = heads_TN.unflatten(-1, (-1, self.shape.head_dim))
        q_THd, k_TKd, v_TKd = heads_TNd.split((*heads, heads[1]), dim=1)
        return q_THd, k_TKd, v_TKd

    def _add_feed_forward_(self, weights: Layer, hidden_TD: Tensor, *, fp8: bool) -> None:
        """See `add_feed_forward_`, of few tokens."""
        if weights.experts is not None:
            normed_TD = hidden_TD if weights.ffn_norm is None else weights.ffn_norm(hidden_TD)
            self._add_(hidden_TD, weights.experts(normed_TD, fp8=fp8), weights.ffn_post_norm)
            return
        assert weights.gate_up is not None
        assert weights.down is not None
        gate_up_T2F = self._normed(hidden_TD, weights.ffn_norm, weights.gate_up, fp8=fp8)
        given: Tensor | Quantised
        if fp8 and self._slots.gate == "silu":
            given = silu_mul_quantized(gate_up_T2F)
        else:
            given = gated(gate_up_T2F, self._slots.gate)
            given = quantize_rows(given) if fp8 else given
        self._add_projected_(hidden_TD, weights.down, given, weights.ffn_post_norm)

    def _add_projected_(
        self, total_TD: Tensor, projection: Projection, given: Tensor | Quantised, post_norm: Norm | None
    ) -> None:
        """Add a projection, in fp8 of what is quantised, to the residual stream, after its norm if any."""
        if not isinstance(given, Tensor):
            self._add_(total_TD, projection.in_fp8(*given), post_norm)
        elif post_norm is None and self._slots.residual_scale == 1:
            projection.add_to_(total_TD, given)
        else:
            self._add_(total_TD, projection(given), post_norm)

    def _add_(self, total_TD: Tensor, added_TD: Tensor, post_norm: Norm | None) -> None:
        """Add to the residual stream, after a norm if there is one, by the family's scale."""
        added_TD = added_TD if post_norm is None else post_norm(added_TD)
        total_TD.add_(added_TD, alpha=self._slots.residual_scale)

    def _normed(
        self,
        hidden_TD: Tensor,
        norm: Norm | None,
        projection: Projection,
        *,
        fp8: bool,
        out_TN: Tensor | None = None,
    ) -> Tensor:
        """(T, N) a projection of the residual stream after its norm; written to `out_TN` if there is one."""
        if fp8:
            given = quantize_rows(hidden_TD) if norm is None else norm.quantised(hidden_TD)
            return projection.in_fp8(*given, out_TN)
        return projection(hidden_TD if norm is None else norm(hidden_TD), out_TN)
