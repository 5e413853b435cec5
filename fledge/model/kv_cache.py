"""Keys and values of what a batch of sequences has read so far.

B sequences, T new tokens, M keys' heads, then values' heads, S slots, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fledge.model.config import ModelConfig
from fledge.model.ngram import NgramConfig


class KVCache:
    """A static cache: slot s of row b holds position s of that row, so rows may have different lengths
    and no padding ever sits inside a sequence. Slots from `lengths_B[b]` on hold nothing that is read."""

    def __init__(
        self,
        config: ModelConfig | NgramConfig,
        batch: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # One slot more, never read: where padding beyond the last position goes.
        shape = (batch, 2 * config.num_key_value_heads, slots + 1, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]  # (B, M, S + 1, D)
        self.lengths_B = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def slots(self) -> int:
        """How many positions a row can hold."""
        return self.layers[0].shape[2] - 1

    def places(self, positions_BT: Tensor) -> Tensor:
        """Where the keys and values of some positions are, counted through a layer: (B * T * M)."""
        B, M, S, _ = self.layers[0].shape
        rows_BM = torch.arange(B * M, device=positions_BT.device).view(B, M) * S
        return (rows_BM[:, None] + positions_BT[..., None]).flatten()

    def put(self, layer: int, kv_BTMD: Tensor, places: Tensor | slice) -> Tensor:
        """Store new keys and values, at `places` or at the same positions of each row; returns all of the
        layer's (B, M, S + 1, D)."""
        held_BMSD = self.layers[layer]
        if isinstance(places, slice):
            held_BMSD[:, :, places] = kv_BTMD.transpose(1, 2)
        else:
            D = held_BMSD.shape[-1]
            held_BMSD.view(-1, D).index_copy_(0, places, kv_BTMD.reshape(-1, D).to(held_BMSD.dtype))
        return held_BMSD

    def rows(self, first: int, last: int) -> KVCache:
        """Some neighbouring rows, in the same memory."""
        return self._with([t[first:last] for t in self.layers], self.lengths_B[first:last])

    def select(self, rows: Tensor) -> KVCache:
        """A copy that holds the given rows, in that order (rows may repeat: a fork)."""
        return self._with([t[rows] for t in self.layers], self.lengths_B[rows])

    def fork(self) -> KVCache:
        """An independent copy."""
        return self._with([t.clone() for t in self.layers], self.lengths_B.clone())

    def truncate(self, lengths_B: Tensor) -> None:
        """Forget everything from the given lengths on."""
        self.lengths_B = torch.minimum(self.lengths_B, lengths_B.to(self.lengths_B))

    def _with(self, layers: list[Tensor], lengths_B: Tensor) -> KVCache:
        new = object.__new__(KVCache)
        new.layers, new.lengths_B = layers, lengths_B
        return new
