"""A model spread over ranks: FSDP2 holds a share of every weight and gradient on each, and brings a block's
weights together while it is computed (Rajbhandari et al. 2020, "ZeRO"; Zhao et al. 2023, "PyTorch FSDP").

Every tensor is cut along its first dimension into parts of as many rows as `torch.chunk` gives.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter
from torch.optim import Muon, Optimizer

from fledge.model.transformer import Block, CausalLM
from fledge.train.optim import load_optimizer_tensors, optimizer_tensors
from fledge.train.parallel import Ranks
from fledge.train.spread_muon import SpreadMuon


def rows_of(length: int, rank: int, count: int) -> slice:
    """Which rows of a tensor a rank holds."""
    size = -(-length // count)
    return slice(min(rank * size, length), min((rank + 1) * size, length))


class Shards:
    """A model in training, one share of it on each rank.

    The model that was given has no weights while this trains, except inside `whole`: evaluations, roll-outs
    and files know nothing of shares. Its optimizers are made to work on the shares.
    """

    def __init__(self, model: nn.Module, optimizers: list[Optimizer], ranks: Ranks) -> None:
        device = next(model.parameters()).device
        self.ranks, self.mesh = ranks, init_device_mesh(device.type, (ranks.count,))
        self.model = _spread(model, self.mesh)
        self.full = list(model.parameters())
        self.spread = cast(list[DTensor], list(self.model.parameters()))
        self.shapes = [p.shape for p in self.full]
        self.local = [Parameter(p.to_local().detach(), p.requires_grad) for p in self.spread]
        self.optimizers = [self._on_shares(optimizer) for optimizer in optimizers]
        self.is_whole = True
        self._empty()

    def _on_shares(self, optimizer: Optimizer) -> Optimizer:
        share = {id(full): local for full, local in zip(self.full, self.local, strict=True)}
        for group in optimizer.param_groups:
            group["params"] = [share[id(parameter)] for parameter in group["params"]]
        if not isinstance(optimizer, Muon):
            return optimizer  # computes each number by itself
        shapes = {id(local): shape for local, shape in zip(self.local, self.shapes, strict=True)}
        return SpreadMuon(optimizer.param_groups, shapes, self.ranks)

    def reader(self) -> CausalLM:
        """A spread language model as `forward_of` reads it. The call of the module itself would let go of
        its embedding and head before the backward pass, which would bring them together once more."""
        model = cast(CausalLM, self.model)

        class Reader:
            config, lm_head, hidden_rows = model.config, model.lm_head, model.hidden_rows

            def __call__(self, *rows: Tensor | None) -> Tensor:
                scores_BTV: Tensor = model.lm_head(model.hidden_rows(*rows))  # type: ignore[arg-type]
                return scores_BTV

        return cast(CausalLM, Reader())

    # The model in one piece.

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A block in which the given model has all its weights, on every rank."""
        if self.is_whole:
            yield
            return
        self.fill()
        try:
            yield
        finally:
            self._empty()

    @torch.no_grad()
    def fill(self) -> None:
        """Give the model all its weights, for good."""
        for full, spread in zip(self.full, self.spread, strict=True):
            full.data = spread.full_tensor()
        self.is_whole = True

    def _empty(self) -> None:
        for full in self.full:
            full.data = full.data.new_empty(0)
        self.is_whole = False

    # A step.

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm, over all ranks, is at most `max_norm`; what it was."""
        for local, spread in zip(self.local, self.spread, strict=True):
            local.grad = None if spread.grad is None else cast(DTensor, spread.grad).to_local()
        grads = [local.grad for local in self.local if local.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(grad) for grad in grads])
        squares = norms.double().square().sum()
        dist.all_reduce(squares)
        norm = squares.sqrt().float()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale)
        return norm

    def update(self) -> None:
        """One step of each optimizer, with the gradients that `clip` left."""
        for optimizer in self.optimizers:
            optimizer.step()
        for local, spread in zip(self.local, self.spread, strict=True):
            local.grad = spread.grad = None

    def finite(self) -> bool:
        """Whether every weight is a number, on every rank."""
        mine = all(bool(local.isfinite().all()) for local in self.local)
        return all(self.ranks.gather(mine))

    # Files.

    @torch.no_grad()
    def load_weights(self, names: list[str], weights: dict[str, Tensor]) -> None:
        """This rank's share of the weights that are trained; `names` are those of all parameters."""
        for name, local, shape in zip(names, self.local, self.shapes, strict=True):
            if local.requires_grad:
                local.copy_(self._share(weights[name], shape))

    def save_optimizers(self, directory: Path) -> None:
        """Each rank writes its share of the optimizers' state, as safetensors with the place of each part."""
        state: dict[str, Any] = {}
        for name, value in optimizer_tensors(self.optimizers).items():
            state[name] = self._placed(value, self._shape_of(name)) if value.ndim else value
        writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
        with _own_errors():
            state_dict_saver.save(state, storage_writer=writer)

    def load_optimizers(self, directory: Path) -> None:
        """What so many or another number of ranks saved."""
        state: dict[str, Any] = {}
        for name, size in saved_shapes(directory).items():
            if not size:
                state[name] = torch.zeros(())
                continue
            local = torch.zeros(self._share_shape(size), device=self.local[0].device)
            state[name] = self._placed(local, size)
        with _own_errors():
            state_dict_loader.load(state, storage_reader=HuggingFaceStorageReader(str(directory)))
        found = {name: v.to_local() if isinstance(v, DTensor) else v for name, v in state.items()}
        load_optimizer_tensors(self.optimizers, found)

    def take_optimizers(self, tensors: dict[str, Tensor]) -> None:
        """This rank's share of the whole state, as one process saves it."""
        shares = {name: self._share(v, v.shape) if v.ndim else v for name, v in tensors.items()}
        load_optimizer_tensors(self.optimizers, shares)

    def _share(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        assert tensor.shape == shape
        return tensor[rows_of(shape[0], self.ranks.rank, self.ranks.count)]

    def _share_shape(self, shape: torch.Size) -> tuple[int, ...]:
        rows = rows_of(shape[0], self.ranks.rank, self.ranks.count)
        return (rows.stop - rows.start, *shape[1:])

    def _placed(self, local: Tensor, shape: torch.Size) -> DTensor:
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def _shape_of(self, name: str) -> torch.Size:
        """The whole shape of the parameter that `<optimizer>.<parameter>.<key>` belongs to."""
        number, index, _ = name.split(".")
        groups = self.optimizers[int(number)].param_groups
        parameter = [p for group in groups for p in group["params"]][int(index)]
        return next(s for p, s in zip(self.local, self.shapes, strict=True) if p is parameter)


def saved_shapes(directory: Path) -> dict[str, torch.Size]:
    """The whole tensors whose parts `save_optimizers` wrote."""
    found = HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
    return {name: one.size for name, one in found.items() if hasattr(one, "size")}


def whole_optimizers(directory: Path) -> dict[str, Tensor]:
    """The whole state that several ranks saved, for one process to go on with."""
    state = {name: torch.zeros(size) for name, size in saved_shapes(directory).items()}
    reader = HuggingFaceStorageReader(str(directory))
    with warnings.catch_warnings():  # that there is one process is what was asked for
        warnings.simplefilter("ignore", UserWarning)
        state_dict_loader.load(cast(dict[str, Any], state), storage_reader=reader, no_dist=True)
    return state


def _spread(model: nn.Module, mesh: Any) -> nn.Module:
    """The same model, its parameters spread over the ranks; the given one keeps its own.

    A unit that is brought together at once is a block, or what is left of a language model: its embedding and
    head stay together from the forward to the backward pass, as losses read the head by itself.
    """
    spread = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    modules = list(spread.modules())
    for block in modules:
        if isinstance(block, Block):
            fully_shard(block, mesh=mesh)
    rest = [module for module in reversed(modules) if isinstance(module, CausalLM) and module is not spread]
    for unit in (*rest, spread):
        fully_shard(unit, mesh=mesh, reshard_after_forward=False)
        if isinstance(unit, CausalLM):
            register_fsdp_forward_method(unit, "hidden_rows")
    for module in modules:
        if isinstance(module, FSDPModule):  # the loop has divided by the sums over all ranks already
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return spread


@contextmanager
def _own_errors() -> Iterator[None]:
    """What went wrong on the first rank that failed, as itself: the collected errors are no `Exception`."""
    try:
        yield
    except CheckpointException as error:
        first: BaseException = next(iter(error.failures.values()))[0]
        raise first from error
