"""Muon (Jordan et al. 2024) on matrices that are spread over ranks.

Its update is the orthogonal part of a whole matrix: that of a rank's rows is another one. So the rows of each
matrix come together on one rank, its owner, which orthogonalises it and sends every rank its rows back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer, _muon

from fledge.train.parallel import Ranks


class SpreadMuon(Optimizer):
    """`torch.optim.Muon` with the rows of each matrix on all ranks, as `torch.chunk` cuts them."""

    def __init__(self, groups: list[dict[str, Any]], shapes: dict[int, torch.Size], ranks: Ranks) -> None:
        """Takes over the groups (settings and this rank's rows) of a `torch.optim.Muon`; `shapes` are the
        whole ones, by the id of each parameter."""
        super().__init__(groups, {})
        self.ranks = ranks
        self.shapes = [[shapes[id(p)] for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update this rank's rows by the gradients of theirs."""
        for group, shapes in zip(self.param_groups, self.shapes, strict=True):
            # Matrices of one size together, so that no owner waits for one that has a larger one.
            order = sorted(range(len(shapes)), key=lambda i: (shapes[i].numel(), tuple(shapes[i]), i))
            for first in range(0, len(order), self.ranks.count):
                chosen = order[first : first + self.ranks.count]
                parameters = [group["params"][i] for i in chosen]
                if any(p.grad is None for p in parameters):
                    continue
                updates = [self._momentum(p, group) for p in parameters]
                orthogonal = self._orthogonal(updates, [shapes[i] for i in chosen], group)
                for p, i, update in zip(parameters, chosen, orthogonal, strict=True):
                    rate = _muon._adjust_lr(group["lr"], group["adjust_lr_fn"], shapes[i])
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-rate)

    def _momentum(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """What is to be orthogonalised: Nesterov's look ahead, number by number."""
        grad, state = parameter.grad, self.state[parameter]
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(grad, 1 - group["momentum"])
        return grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer

    def _orthogonal(
        self, mine: list[Tensor], shapes: list[torch.Size], group: dict[str, Any]
    ) -> Iterator[Tensor]:
        """This rank's rows of the orthogonalised matrices; matrix k is rank k's to compute."""
        rank, count = self.ranks.rank, self.ranks.count
        sizes = [[rows * shape[1] for rows in _rows(shape[0], count)] for shape in shapes]
        own = sizes[rank] if rank < len(shapes) else [0] * count
        sent = [sizes[k][rank] if k < len(shapes) else 0 for k in range(count)]
        parts = _exchange(torch.cat([rows.flatten() for rows in mine]), sent, own)
        if rank < len(shapes):
            matrix = parts.view(shapes[rank])
            settings = (group["ns_coefficients"], group["ns_steps"], group["eps"])
            parts = _muon._zeropower_via_newtonschulz(matrix, *settings).to(matrix.dtype).flatten()
        back = _exchange(parts.contiguous(), own, sent)
        for rows, part in zip(mine, torch.split(back, sent[: len(mine)]), strict=True):
            yield part.view(rows.shape)


def _rows(length: int, count: int) -> list[int]:
    """How many rows each rank has."""
    size = -(-length // count)
    return [max(0, min((rank + 1) * size, length) - min(rank * size, length)) for rank in range(count)]


def _exchange(values: Tensor, sent: Sequence[int], got: Sequence[int]) -> Tensor:
    """Send each rank its part of the values; what all ranks sent to this one, one behind the other."""
    received = values.new_empty(sum(got))
    dist.all_to_all_single(received, values, list(got), list(sent))
    return received
