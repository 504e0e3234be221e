"""The dimensions of a decoder-only transformer, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

# of a prefill that linear layers run on at once: enough to fill any device, and few enough that what is as
# wide as the feed-forward network stays small beside what attention needs of a long document
PIECE_TOKENS = 16384
ROWS_TOGETHER = 64  # of them, so that each piece begins where kernels and products like to read
QUERY_PIECES = 4  # such pieces whose queries and attention are held at once: enough for attention kernels too


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What planning and operation counts need to know of a model; no tensors, no torch."""

    layers: int
    hidden: int  # D, width of the residual stream
    ffn: int  # width inside the gated feed-forward network, or inside each of the experts
    heads: int  # H, query heads
    kv_heads: int  # K, key/value heads
    head_dim: int  # d
    vocab: int
    context: int  # longest sequence in tokens, prompt and answer together
    windows: tuple[int | None, ...] = ()  # of each layer, as `window` tells it; empty: no layer has one
    has_long_rope: bool = False  # a document's keys depend on how long it and its answer may become
    experts: int = 0  # feed-forward networks of each layer, among which a token has some; 0: one for all
    experts_per_token: int = 1
    has_sinks: bool = False  # heads give a share of their attention to no token

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of one token's keys and values in one layer."""
        return 2 * self.kv_heads * self.head_dim * itemsize

    def window(self, layer: int) -> int | None:
        """The last positions that a token attends to, its own among them; None: all before it."""
        return self.windows[layer] if self.windows else None

    @property
    def slides(self) -> bool:
        """Whether the attention of any layer has a window."""
        return any(self.windows)

    @property
    def shares_documents(self) -> bool:
        """Whether rows can read keys and values of one document that stands at the beginning of each.

        With windows each row's would begin at another place in it, and with LongRoPE its keys may differ.
        """
        return not self.slides and not self.has_long_rope

    @property
    def ffn_per_token(self) -> int:
        """Width of all feed-forward networks that a token passes in a layer."""
        return self.ffn * self.experts_per_token
