"""Pretraining text beside roll-outs: PPO-ptx (Ouyang et al. 2022), against forgetting what came before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fledge.data.packing import Ints, StreamRows
from fledge.data.sources import Source, read_documents
from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer


@dataclass
class TextBatch:
    """Rows of T + 1 tokens of text; all but the first are targets."""

    input_ids: Tensor

    def to(self, device: torch.device) -> TextBatch:
        """The same batch on a device."""
        return TextBatch(self.input_ids.to(device))

    def num_tokens(self) -> int:
        """How many tokens are read."""
        return self.input_ids[:, :-1].numel()

    def denominators(self) -> dict[str, int]:
        """Text has a denominator of its own, so that its weight does not depend on how much there is."""
        return {"tokens": 0, "text_tokens": self.num_tokens()}


@dataclass(frozen=True)
class _Texts:
    """Documents in memory, each beginning with the separator."""

    ids: list[Ints]

    @property
    def lengths(self) -> Ints:
        return np.array([len(ids) for ids in self.ids], dtype=np.int64)

    def read(self, document: int, start: int, length: int) -> npt.NDArray[np.integer]:
        return self.ids[document][start : start + length]


@dataclass(frozen=True)
class PretrainingMix:
    """Which text belongs to which step: the documents end to end, in another order each epoch."""

    stream: StreamRows
    rows: int
    """Of a step."""
    micro_rows: int

    def batches(self, step: int) -> list[TextBatch]:
        """The text of a step in micro-batches; a pure function of the step."""
        ids = [self.stream.row(n).ids for n in range(step * self.rows, (step + 1) * self.rows)]
        parts = (ids[i : i + self.micro_rows] for i in range(0, self.rows, self.micro_rows))
        return [TextBatch(torch.tensor(np.stack(part))) for part in parts]


def read_mix(
    paths: Sequence[Path], tokenizer: Tokenizer, rows: int, row_tokens: int, micro_tokens: int, seed: int
) -> PretrainingMix:
    """The text of files (as `fledge pretrain` reads them), all of it in memory. Raises UserError with file
    and line for what cannot be read, and if there is none."""
    texts = [text for path in paths for text in read_documents(Source(path.name, str(path), None))]
    if not texts:
        raise UserError(f"{paths[0]}: holds no text to mix in")
    ids = [np.array([tokenizer.start_id, *row], dtype=np.int64) for row in tokenizer.encode_batch(texts)]
    stream = StreamRows(_Texts(ids), np.arange(len(ids)), row_tokens, tokenizer.start_id, [seed, 4])
    return PretrainingMix(stream, rows, max(1, micro_tokens // row_tokens))
