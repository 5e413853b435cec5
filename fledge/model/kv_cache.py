"""Keys and values of what a batch of sequences has read so far.

B sequences, L layers, H key-value heads, S slots, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fledge.model.config import ModelConfig


class KVCache:
    """A static cache: slot s of row b holds position s of that row, so rows may have different lengths
    and no padding ever sits inside a sequence. Slots from `lengths_B[b]` on hold nothing that is read."""

    def __init__(
        self, config: ModelConfig, batch: int, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        # One slot more, never read: where padding beyond the last position goes.
        shape = (batch, config.num_key_value_heads, slots + 1, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.lengths_B = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def slots(self) -> int:
        """How many positions a row can hold."""
        return self.keys[0].shape[2] - 1

    def write(
        self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor, positions_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values at their positions; returns all of the layer's (B, H, S + 1, D)."""
        rows = torch.arange(positions_BT.shape[0], device=positions_BT.device)[:, None]
        self.keys[layer][rows, :, positions_BT] = k_BHTD.transpose(1, 2).to(self.keys[layer].dtype)
        self.values[layer][rows, :, positions_BT] = v_BHTD.transpose(1, 2).to(self.values[layer].dtype)
        return self.keys[layer], self.values[layer]

    def select(self, rows: Tensor) -> KVCache:
        """A copy that holds the given rows, in that order (rows may repeat: a fork)."""
        return self._with([t[rows] for t in self.keys], [t[rows] for t in self.values], self.lengths_B[rows])

    def fork(self) -> KVCache:
        """An independent copy."""
        return self._with(
            [t.clone() for t in self.keys], [t.clone() for t in self.values], self.lengths_B.clone()
        )

    def truncate(self, lengths_B: Tensor) -> None:
        """Forget everything from the given lengths on."""
        self.lengths_B = torch.minimum(self.lengths_B, lengths_B.to(self.lengths_B))

    def _with(self, keys: list[Tensor], values: list[Tensor], lengths_B: Tensor) -> KVCache:
        new = object.__new__(KVCache)
        new.keys, new.values, new.lengths_B = keys, values, lengths_B
        return new
