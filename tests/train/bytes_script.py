"""What two ranks really send in a step, and hold: `bytes_script.py OPTIMIZER MICRO_BATCHES FILE`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.train.losses import forward_of
from fledge.train.optim import make_optimizers
from fledge.train.parallel import joined
from fledge.train.shards import Shards

# 64 divides every size by the number of ranks, so that nothing is padded.
SHAPE = ModelConfig("qwen3", 512, 64, 128, 3, 2, 2, 32, 64)


class Counted(TorchDispatchMode):
    """Notes the bytes that each collective brings this rank from the others."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.others, self.seen = (count - 1) / count, dict[str, list[float]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for name, place in (("_allgather_base_", 0), ("_reduce_scatter_base_", 1)):
            if func is getattr(torch.ops.c10d, name).default:
                self.seen.setdefault(name, []).append(args[place].nbytes * self.others)
        if func is torch.ops.c10d.alltoall_base_.default:  # the first rank: all but what it sends itself
            self.seen.setdefault("alltoall_base_", []).append(sum(args[3][1:]) * args[0].itemsize)
        return func(*args, **(kwargs or {}))


def main() -> None:
    torch.set_num_threads(1)
    optimizer, micro_batches, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    with joined("cpu") as ranks:
        model = CausalLM(SHAPE)
        model.init_weights(torch.Generator().manual_seed(0))
        shards = Shards(model, make_optimizers(model, optimizer, 0.02, 0.003, 0.0), ranks)  # type: ignore[arg-type]
        ids = torch.randint(512, (2, 33), generator=torch.Generator().manual_seed(ranks.rank))
        forward = forward_of(shards.reader())
        with Counted(ranks.count) as counted:
            for _ in range(micro_batches):
                forward(ids, None).sum().backward()
            shards.clip(1.0)
            shards.update()
        held = {
            "weights": sum(local.nbytes for local in shards.local),
            "moments": sum(
                value.nbytes
                for one in shards.optimizers
                for state in one.state.values()
                for value in state.values()
                if value.ndim
            ),
        }
        if ranks.leads:
            out.write_text(json.dumps({"received": counted.seen, "held": held}))


if __name__ == "__main__":
    main()
    os._exit(0)
