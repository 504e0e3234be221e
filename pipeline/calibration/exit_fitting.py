"""Exit maps fitted on text: ridge regression from the state that tokens would stop with to later K/V.

What is fitted of a layer is the difference that its map is to make: that of its keys and values, before
RoPE, from those that it would make of the state that tokens stop with. The more a ridge weighs, the nearer a
map is to the layer's own projection. Letters: T tokens, D width, F = D + 1 with a constant, N columns of keys
and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.families.decoder import Decoder
from pipeline.families.exit_maps import MapsHeader, behind_norm, mapped_layers, own_map, plainly_normed
from pipeline.kernels.segments import Segments
from pipeline.model.cache import RaggedCache
from pipeline.model.layers import Survivors, run_layers
from pipeline.model.loading import LoadedModel
from pipeline.model.pack import Pack, PartialPrefill
from pipeline.pruning.dense import Dense
from pipeline.records import EncodedDocument, Spans

PROMPT_TOKENS = 4096  # of each prompt, its first ones
FIT_TOKENS = 196_608  # of all
HELD_OUT_EVERY = 4  # documents, of which one says how much a ridge is to weigh
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # times the mean square of a feature


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Maps for one layer to stop after."""

    about: MapsHeader
    maps: dict[int, tuple[Tensor, Tensor]]  # by layer, weight (N, D) and bias (N,), in the model's dtype
    unexplained: dict[int, float]  # of what each is to make, the share that it misses on text held out


class _Moments:
    """Sums over tokens of one side, from which maps of one layer to stop after are found."""

    def __init__(self, decoder: Decoder, layers: Iterable[int]) -> None:
        features, shape = decoder.shape.hidden + 1, decoder.shape
        columns = 2 * shape.kv_heads * shape.head_dim
        self.tokens = 0
        self.square_FF = torch.zeros((features, features), dtype=torch.float64, device=decoder.device)
        self.product_FN = {layer: self.square_FF.new_zeros(features, columns) for layer in layers}
        self.target_square = dict.fromkeys(self.product_FN, 0.0)

    def add_features(self, features_TF: Tensor) -> None:
        self.tokens += len(features_TF)
        self.square_FF += features_TF.T @ features_TF

    def add_targets(self, layer: int, features_TF: Tensor, targets_TN: Tensor) -> None:
        self.product_FN[layer] += features_TF.T @ targets_TN
        self.target_square[layer] += float(targets_TN.square().sum(dtype=torch.float64))

    def missed(self, layer: int, found_FN: Tensor) -> float:
        """The share of the targets' squares that a map misses."""
        explained = (
            2 * (found_FN * self.product_FN[layer]).sum() - ((self.square_FF @ found_FN) * found_FN).sum()
        )
        return 1 - float(explained) / max(self.target_square[layer], 1e-30)


@torch.inference_mode()
def fit_exit_maps(
    model: LoadedModel,
    prompts: Sequence[EncodedDocument],
    stops: Sequence[int],
    *,
    check: Callable[[], None] = lambda: None,
    within: Callable[[], bool] = lambda: True,
) -> list[Fitted]:
    """Maps for stopping after each of `stops`, layers from 0, by what the model makes of the whole prompts.

    Of each prompt the first `PROMPT_TOKENS` are read, up to `FIT_TOKENS` in all; every fourth prompt chooses
    the ridge. With fewer than four that is chosen on what it is fitted on. `check` is called before every
    layer, and may raise to give up; where `within` says no, no more prompts are read, but one. Raises
    ConfigError for a family whose attention reads the stream without a norm.
    """
    decoder = model.decoder
    sides = {
        last: [_Moments(decoder, mapped_layers(decoder.shape, last)) for _ in range(2)] for last in stops
    }
    tokens = 0
    for number, prompt in enumerate(prompts):
        ids = torch.from_numpy(prompt.input_ids[: min(PROMPT_TOKENS, FIT_TOKENS - tokens)])
        if not len(ids) or (number and not within()):
            break
        tokens += len(ids)
        side = int(number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)
        _add(model, ids, {last: both[side] for last, both in sides.items()}, check)
    return [_fitted(model, last, *both) for last, both in sides.items()]


def _add(model: LoadedModel, ids_T: Tensor, moments: dict[int, _Moments], check: Callable[[], None]) -> None:
    """Run a prompt through all layers, and add what there is between them."""
    decoder = model.decoder
    spans = (Spans(document=(0, len(ids_T)), question=(len(ids_T), len(ids_T))),)
    segments = Segments.of([len(ids_T)], decoder.device)
    pack = Pack(input_ids=ids_T.to(decoder.device), segments=segments, spans=spans)
    begun = PartialPrefill.afresh(decoder, pack, RaggedCache(0))
    features: dict[int, Tensor] = {}
    for layer in range(decoder.shape.layers):
        for last, own in moments.items():
            if layer == last + 1:
                features[last] = _with_constant(plainly_normed(decoder, layer, begun.hidden_TD))
                own.add_features(features[last])
            elif layer > last + 1:
                input_TD = plainly_normed(decoder, layer, begun.hidden_TD)
                weight_ND, _ = own_map(decoder, layer)
                changed_TN = (input_TD - features[last][:, :-1]) @ weight_ND.T
                own.add_targets(layer, features[last], changed_TN)
        if layer + 1 < decoder.shape.layers:
            outcome = run_layers(decoder, model.attention, Dense(), pack, None, begun, check, stop=layer + 1)
            assert isinstance(outcome, Survivors)
            begun = replace(begun, layers=layer + 1, hidden_TD=outcome.hidden_TD)


def _with_constant(x_TD: Tensor) -> Tensor:
    return torch.cat([x_TD, x_TD.new_ones(len(x_TD), 1)], 1)


def _fitted(model: LoadedModel, last: int, fit: _Moments, held_out: _Moments) -> Fitted:
    decoder = model.decoder
    judge = held_out if held_out.tokens else fit
    roots_F, basis_FF = torch.linalg.eigh(fit.square_FF)
    mean_square = float(fit.square_FF.diagonal().mean())
    maps, unexplained = {}, {}
    for layer, product_FN in fit.product_FN.items():
        turned_FN = basis_FF.T @ product_FN
        tried = [
            basis_FF @ (turned_FN / (roots_F.clamp(min=0) + ridge * mean_square)[:, None]) for ridge in RIDGES
        ]
        found_FN = min(tried, key=lambda each: judge.missed(layer, each))
        unexplained[layer] = judge.missed(layer, found_FN)
        weight_ND, bias_N = own_map(decoder, layer)
        weight_ND = behind_norm(decoder, layer, weight_ND + found_FN[:-1].T.float())
        maps[layer] = (weight_ND.to(decoder.dtype), (bias_N + found_FN[-1].float()).to(decoder.dtype))
    about = MapsHeader(fingerprint=model.fingerprint, last_full=last, tokens=fit.tokens + held_out.tokens)
    return Fitted(about=about, maps=maps, unexplained=unexplained)
