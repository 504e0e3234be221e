"""Tokens kept and FFN tiers by layer, over all documents of a run, in memory that does not grow with them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

BINS = 1_000  # of a share of 1; a method that runs twice over the prompt reaches shares up to 2
SAMPLED = 240  # documents of the heat maps
LAYER_COLUMNS = ("prompt_tokens", "kept_tokens", "ffn_tokens", "ffn_fp8_tokens")


class LayerShares:
    """Of each layer: what share of a prompt's tokens entered it, passed its FFN, and passed it in fp8.

    Means are over documents, quantiles exact to a thousandth; a sample of documents is kept whole.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.documents = 0
        self.sums = np.zeros((3, layers))  # entered, FFN, fp8
        self._bins = np.zeros((2, layers, 2 * BINS + 1), np.int64)  # entered, FFN
        self._sample = np.zeros((0, 1 + 2 * layers), np.float32)  # tokens, then both shares by layer
        self._draws = np.zeros(0)  # a number a document of the sample, by which it was chosen
        self._random = np.random.default_rng(0)

    def add(self, tokens_N: np.ndarray, counts_3NL: np.ndarray) -> None:
        """Count documents of so many prompt tokens, with their tokens that entered, passed, passed in fp8."""
        shares_3NL = counts_3NL / tokens_N[None, :, None]
        self.documents += len(tokens_N)
        self.sums += shares_3NL.sum(1)
        layers = np.broadcast_to(np.arange(self.layers), shares_3NL.shape[1:])
        for bins, shares_NL in zip(self._bins, shares_3NL, strict=False):
            np.add.at(bins, (layers, np.clip(np.rint(shares_NL * BINS), 0, 2 * BINS).astype(int)), 1)
        rows = np.concatenate([tokens_N[:, None], shares_3NL[0], shares_3NL[1]], axis=1).astype(np.float32)
        self._sample = np.concatenate([self._sample, rows])
        self._draws = np.concatenate([self._draws, self._random.random(len(rows))])
        if len(self._draws) > SAMPLED:
            best = np.argpartition(self._draws, SAMPLED)[:SAMPLED]
            self._sample, self._draws = self._sample[best], self._draws[best]

    def quantile(self, what: int, share: float) -> np.ndarray:
        """(L,) a quantile over documents of the share that entered (0) or passed the FFN (1)."""
        below_LB = np.cumsum(self._bins[what], axis=1)
        return np.argmax(below_LB >= max(share * self.documents, 1), axis=1) / BINS

    def means(self) -> np.ndarray:
        """(3, L) mean shares that entered, passed the FFN, and passed it in fp8."""
        return self.sums / max(self.documents, 1)

    def tiers(self) -> dict[str, np.ndarray]:
        """(L,) mean shares by what became of a token in a layer; together 1, unless the prompt ran twice."""
        entered, ffn, fp8 = self.means()
        return {
            "FFN in full": ffn - fp8,
            "FFN in fp8": fp8,
            "FFN skipped": entered - ffn,
            "left before": np.clip(1 - entered, 0, None),
        }

    def sampled(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Some documents, the shortest first: (n,) tokens, (n, L) shares that entered and passed the FFN."""
        rows = self._sample[np.argsort(self._sample[:, 0], kind="stable")]
        return rows[:, 0], rows[:, 1 : 1 + self.layers], rows[:, 1 + self.layers :]


def add_layers(shares: LayerShares | None, table: pa.Table) -> LayerShares | None:
    """Count a table's documents that were answered; the first of them says how many layers there are."""
    tokens = table["prompt_tokens"].to_numpy(zero_copy_only=False)
    lists = [table[name].combine_chunks() for name in LAYER_COLUMNS[1:]]
    lengths = [column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False) for column in lists]
    if shares is None and lengths[0].max(initial=0):
        shares = LayerShares(layers=int(lengths[0][lengths[0] > 0][0]))
    if shares is None:
        return None
    whole = (tokens > 0) & (lengths[0] == shares.layers) & (lengths[1] == shares.layers)
    if whole.any():
        counts = [_matrix(column, whole, shares.layers) for column in lists[:2]]
        has_fp8 = bool((lengths[2][whole] == shares.layers).all())
        counts.append(_matrix(lists[2], whole, shares.layers) if has_fp8 else np.zeros_like(counts[0]))
        shares.add(tokens[whole], np.stack(counts))
    return shares


def _matrix(column: pa.ListArray, rows: np.ndarray, layers: int) -> np.ndarray:
    return column.filter(pa.array(rows)).flatten().to_numpy(zero_copy_only=False).reshape(-1, layers)
