"""transformers' decoder layers, opened up into their parts.

Of its internals only the families' files, layer.py, projection.py and building.py know too.
The forward pass of a layer is ours (see layers.py); the weights and modules are transformers'.
Supported families are an allow-list, each tested against stock transformers on small configurations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.families.configuration import check_config, check_fp8, shape_of, slots_of
from pipeline.families.head import Head
from pipeline.families.layer import Layer, are_plain, attention_scale
from pipeline.families.longrope import LongRope
from pipeline.families.projection import HeldAs, LinearPrecision, Norm, Projection
from pipeline.families.residual import Normed, ResidualSums
from pipeline.families.rope import Rope
from pipeline.families.rotary import Rotary
from pipeline.families.sharding import own_shape
from pipeline.families.supported import FAMILIES
from pipeline.kernels.fused import Quantised, gated, gated_quantized, quantize_rows
from pipeline.kernels.kv_fp8 import KvTarget
from pipeline.kernels.step import Product, has_kernels, product_silu_mul_quantized, rope_and_store_
from pipeline.pruning.shape import PIECE_TOKENS, QUERY_PIECES, ROWS_TOGETHER
from pipeline.ranks.collectives import Ranks
from pipeline.ranks.leading import OnEachRank

HALVED_TOKENS = 4096  # from which on ranks have two pieces at least, so that sums hide behind products
STEP_ROWS = 256  # up to which fp8 products are faster without their scales


class Decoder(OnEachRank):
    """A loaded model, taken apart. Token tensors are packed: (T, ...), no batch dimension.

    Of several ranks each has a part of every layer, of the `own` shape: heads are its own heads. The residual
    stream is the same on all, since what layers add to it is summed over the ranks.

    Linear layers run on at most `piece_tokens` tokens at once: what is wider than the residual stream or
    lives for one product is as large as a piece, however many tokens there are.
    """

    def __init__(self, model: PreTrainedModel, ranks: Ranks | None = None) -> None:
        """Of a model that has its share of the weights, if there are several `ranks`."""
        check_config(model.config)
        self.model, self.ranks = model, ranks
        self.shape, self._slots = shape_of(model.config), slots_of(model.config)
        self.own = own_shape(self.shape, None if ranks is None else ranks.share)
        self._sums = ResidualSums(ranks, self._slots.residual_scale)
        self._body: Any = model.model
        # attention is computed with 1/sqrt(d): queries are multiplied by what another scale is of that
        head_dim = self.shape.head_dim
        self._query_scale = attention_scale(model.model.layers, self._slots, head_dim) * math.sqrt(head_dim)
        family = FAMILIES[model.config.model_type]
        with torch.no_grad():
            self._layers = [family.layer(block, self._slots) for block in self._body.layers]
            self._head = Head(model, self._slots, ranks)
        if ranks is not None and not ranks.leads:
            for layer in self._layers:
                layer.leave_biases_to_others()
        self.rotary = Rotary(self._body.rotary_emb, self._slots, LongRope.of(model.config, self.device))
        self._has_plain_layers = are_plain(self._layers, self._slots, self._query_scale)
        self.linears = "auto"  # of `LINEAR_DTYPES`, among those that `use_linears` was asked for
        self.exit_maps: dict[str, Mapping[int, Projection]] = {}  # by their digests, see exit_maps.py
        self.piece_tokens: int = PIECE_TOKENS

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
        that are not needed any more. Raises ConfigError on a device that cannot.
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
        """See `Rotary.rope`."""
        return self.rotary.rope(hidden_TD, positions_T, reach_T)

    def sinks(self, layer: int) -> Tensor | None:
        """(H,) float32 of a layer's heads, where they have sinks: see kernels/attention.py."""
        return self._layers[layer].sinks_H

    def pieces(self, tokens: int) -> list[slice]:
        """Of so many tokens, in order, as few pieces as `piece_tokens` allows, of about the same size.

        Large ones are of whole `ROWS_TOGETHER`. Several ranks sum one piece while they compute another.
        """
        least = 2 if self.ranks is not None and tokens >= HALVED_TOKENS else 1
        size = max(1, -(-tokens // max(least, -(-tokens // self.piece_tokens))))
        if size > ROWS_TOGETHER:
            size = min(self.piece_tokens, -(-size // ROWS_TOGETHER) * ROWS_TOGETHER)
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    def qkv(
        self, layer: int, hidden_TD: Tensor, rope: Rope, fp8: bool | None = None, normed: Normed | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (T, H, d), keys and values (T, K, d), the first two with RoPE, in fp8 if asked.

        `normed` is what `add_feed_forward_` returned of the layer before, which spares the norm.
        """
        heads = (self.own.heads, self.own.kv_heads)
        return self._heads(layer, hidden_TD, rope, self._layers[layer].qkv, heads, fp8, normed)

    def queries(self, layer: int, hidden_TD: Tensor, rope: Rope, fp8: bool | None = None) -> tuple[Tensor]:
        """(T, H, d) with RoPE, without the share of the projection that keys and values have."""
        heads = self.own.heads
        projection = self._layers[layer].qkv.part(slice(0, heads * self.own.head_dim))
        return self._heads(layer, hidden_TD, rope, projection, (heads, 0), fp8)[:1]

    def has_qkv_in_fp8(self, layer: int) -> bool:
        """Whether a layer's queries, keys and values are in fp8, with `mixed` of tokens that are not kept."""
        form = LinearPrecision(linears=self.linears).form("self_attn.qkv_proj", self.depth_of(layer))
        return form is not HeldAs.FULL

    def depth_of(self, layer: int) -> float:
        """From 0 to less than 1."""
        return layer / self.shape.layers

    def kv_parts(self, layer: int) -> tuple[Norm | None, Projection]:
        """The norm before a layer's attention, and of its projection what makes keys and values."""
        weights = self._layers[layer]
        return weights.input_norm, weights.qkv.part(slice(self.own.heads * self.own.head_dim, None))

    def keys_values(
        self,
        layer: int,
        hidden_TD: Tensor,
        rope: Rope,
        fp8: bool | None = None,
        by: Projection | None = None,
        normed: Normed | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Keys, with RoPE, and values (T, K, d), of the layer's own projection, or `by` one in its place."""
        projection = self.kv_parts(layer)[1] if by is None else by
        return self._heads(layer, hidden_TD, rope, projection, (0, self.own.kv_heads), fp8, normed)[1:]

    def add_attention_(
        self,
        layer: int,
        hidden_TD: Tensor,
        attended_THd: Tensor,
        fp8: bool | None = None,
        *,
        later: bool = False,
        norms: bool = False,
    ) -> Normed | None:
        """Add the projected outputs of the heads to the residual stream, in fp8 if asked or by default.

        With `later` sums over ranks may be on their way: readers of the stream must `Ranks.settle` first.
        With `norms` the result is normed for the FFN too, and returned, where one kernel does both.
        """
        fp8 = self.linears_in_fp8 if fp8 is None else fp8
        weights, normed = self._layers[layer], None
        if norms and fp8 and weights.experts is None:
            normed = self._sums.room(weights.ffn_norm, hidden_TD, weights.attention_post_norm)
        for rows in self.pieces(len(hidden_TD)):
            attended_TN = attended_THd[rows].flatten(1)
            self._sums.add_projected_(
                hidden_TD[rows],
                weights.output,
                quantize_rows(attended_TN) if fp8 else attended_TN,
                weights.attention_post_norm,
                later=later,
                normed=None if normed is None else normed.at(rows),
            )
        return normed

    def add_feed_forward_(
        self,
        layer: int,
        hidden_TD: Tensor,
        fp8: bool | None = None,
        *,
        later: bool = False,
        normed: Normed | None = None,
        norms: bool = False,
    ) -> Normed | None:
        """Add norm and gated FFN to the residual stream, in fp8 if asked or by default; `later` as above.

        `normed` is what `add_attention_` returned, which spares the norm, and is overwritten. With `norms`
        the result is normed for the next layer, where that is in fp8 too, and returned.
        """
        fp8 = self.linears_in_fp8 if fp8 is None else fp8
        weights, following = self._layers[layer], None
        if norms and fp8 and layer + 1 < self.shape.layers and self.has_qkv_in_fp8(layer + 1):
            norm = self._layers[layer + 1].input_norm
            following = self._sums.room(norm, hidden_TD, weights.ffn_post_norm, reuse=normed)
        for rows in self.pieces(len(hidden_TD)):
            given, made = (None if each is None else each.at(rows) for each in (normed, following))
            self._add_feed_forward_(weights, hidden_TD[rows], given, made, fp8=fp8, later=later)
        return following

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
        qkv = Product(self._projected(hidden_BD, weights.input_norm, weights.qkv, fp8=False))
        self.add_attention_(layer, hidden_BD, mixed(qkv))
        self.add_feed_forward_(layer, hidden_BD)
        return None

    def _steps_by_kernels(self, hidden_BD: Tensor) -> bool:
        """Whether a step can run as the kernels for it want: in bfloat16, and in plain layers."""
        few = len(hidden_BD) <= STEP_ROWS or not self.linears_in_fp8
        plain = hidden_BD.dtype == torch.bfloat16 and self._has_plain_layers
        return few and plain and has_kernels(hidden_BD)

    def _step_in_fp8_(
        self, layer: int, hidden_BD: Tensor, mixed: Callable[[Product], Tensor], normed: Quantised | None
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
        normed = self._sums.add_product_normed_(hidden_BD, attended, weights.ffn_norm)
        gated = product_silu_mul_quantized(weights.gate_up.unscaled(normed))
        fed_forward = weights.down.unscaled(gated)
        if not last:
            next_norm = self._layers[layer + 1].input_norm
            assert next_norm is not None
            return self._sums.add_product_normed_(hidden_BD, fed_forward, next_norm)
        self._sums.add_product_(hidden_BD, fed_forward)
        return None

    def head(self, hidden_BD: Tensor) -> Tensor:
        """(B, vocabulary) logits in the model's dtype, whose order is that of `logits`, ties included."""
        return self._head(hidden_BD)

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
        normed: Normed | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(T, H, d), (T, K, d), (T, K, d) of a projection with so many heads of queries and of keys."""
        weights, tokens = self._layers[layer], len(hidden_TD)
        fp8 = self.linears_in_fp8 if fp8 is None else fp8
        if len(self.pieces(tokens)) == 1:
            return self._heads_of_piece(layer, hidden_TD, rope, projection, heads, fp8, normed)
        joined_TN = hidden_TD.new_empty(tokens, projection.outputs)
        for rows in self.pieces(tokens):
            out_TN, given = joined_TN[rows], None if normed is None else normed.at(rows)
            of_piece = hidden_TD[rows], rope.at(rows), projection, heads, fp8, given
            made = self._heads_of_piece(layer, *of_piece, out_TN)
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
        normed: Normed | None,
        out_TN: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of few tokens; their projection is written to `out_TN` if there is one."""
        weights = self._layers[layer]
        heads_TN = self._projected(hidden_TD, weights.input_norm, projection, normed, fp8=fp8, out_TN=out_TN)
        q_THd, k_TKd, v_TKd = self._split(heads_TN, heads)
        q_THd, k_TKd = weights.normed_heads(q_THd, k_TKd)
        rope.turn_(q_THd, k_TKd, self._slots.ropes[layer])
        if heads[0] and not math.isclose(self._query_scale, 1):
            q_THd.mul_(self._query_scale)
        return q_THd, k_TKd, v_TKd

    def _split(self, heads_TN: Tensor, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Views of queries, keys and values, of so many heads of the first and of the others."""
        heads_TNd = heads_TN.unflatten(-1, (-1, self.shape.head_dim))
        q_THd, k_TKd, v_TKd = heads_TNd.split((*heads, heads[1]), dim=1)
        return q_THd, k_TKd, v_TKd

    def _add_feed_forward_(
        self,
        weights: Layer,
        hidden_TD: Tensor,
        normed: Normed | None,
        following: Normed | None,
        *,
        fp8: bool,
        later: bool,
    ) -> None:
        """See `add_feed_forward_`, of few tokens; `following` is room for those of the next layer, if any."""
        if weights.experts is not None:
            normed_TD = hidden_TD if weights.ffn_norm is None else weights.ffn_norm(hidden_TD)
            assert self.ranks is None, "experts are not divided"
            made_TD = weights.experts(normed_TD, fp8=fp8)
            self._sums.add_(hidden_TD, made_TD, weights.ffn_post_norm, following)
            return
        assert weights.gate_up is not None
        assert weights.down is not None
        gate_up_T2F = self._projected(hidden_TD, weights.ffn_norm, weights.gate_up, normed, fp8=fp8)
        given = (gated_quantized if fp8 else gated)(gate_up_T2F, self._slots.gate)
        self._sums.add_projected_(
            hidden_TD, weights.down, given, weights.ffn_post_norm, later=later, normed=following
        )

    def _projected(
        self,
        hidden_TD: Tensor,
        norm: Norm | None,
        projection: Projection,
        normed: Normed | None = None,
        *,
        fp8: bool,
        out_TN: Tensor | None = None,
    ) -> Tensor:
        """(T, N) a projection of the residual stream after its norm; written to `out_TN` if there is one."""
        self._sums.settle(hidden_TD)
        if not fp8:
            return projection(hidden_TD if norm is None else norm(hidden_TD), out_TN)
        if normed is not None:
            assert normed.norm is norm, "rows that were normed for another reader"
            given = normed.quantised
        else:
            given = quantize_rows(hidden_TD) if norm is None else norm.quantised(hidden_TD)
        return projection.in_fp8(*given, out_TN)
