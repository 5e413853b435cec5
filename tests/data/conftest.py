"""What tests of packing share: tokenised documents that are on no disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from fledge.data.packing import Documents, Ints

SEPARATOR = 0


class InMemory:
    """Documents given as ids without their separators."""

    def __init__(self, documents: Sequence[Sequence[int]]) -> None:
        self._ids = [np.array([SEPARATOR, *document]) for document in documents]

    @property
    def lengths(self) -> Ints:
        return np.array([len(ids) for ids in self._ids], dtype=np.int64)

    def read(self, document: int, start: int, length: int) -> npt.NDArray[np.integer]:
        return self._ids[document][start : start + length]


@pytest.fixture(scope="session")
def in_memory() -> Callable[[Sequence[Sequence[int]]], Documents]:
    return InMemory
