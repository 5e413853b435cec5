"""Commands, one after the other, in each process that torchrun starts: `ranks_script.py COMMANDS.json`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import _muon

import fledge.files
from fledge import cli


def in_fp32(grad: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz as `torch.optim.Muon` does it, in fp32 instead of bf16, so that results can be compared
    closely."""
    a, b, c = coefficients
    wide = grad.T if grad.shape[0] > grad.shape[1] else grad
    x = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if grad.shape[0] > grad.shape[1] else x


def main() -> None:
    torch.set_num_threads(1)
    fledge.files._sync = lambda path: None
    _muon._zeropower_via_newtonschulz = in_fp32
    for command in json.loads(Path(sys.argv[1]).read_text()):
        if code := cli.main(command):
            os._exit(code)
    sys.stderr.flush()
    os._exit(0)  # as `fledge` itself ends


if __name__ == "__main__":
    main()
