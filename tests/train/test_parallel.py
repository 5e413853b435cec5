"""What several ranks do of a step, each checked by itself; tests/stages/test_ranks.py starts real ones."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fledge.errors import UserError
from fledge.run import Run
from fledge.train.parallel import ALONE, Ranks, joined
from fledge.train.shards import rows_of
from fledge.train.steps import Idle, own_batches, row_steps
from fledge.types import Batch

counts = st.integers(1, 9)


def all_ranks(count: int) -> list[Ranks]:
    return [Ranks(rank, count) for rank in range(count)]


@given(counts, st.integers(0, 40))
def test_spans_share_out_all_items_in_order(count: int, length: int) -> None:
    spans = [ranks.span(length) for ranks in all_ranks(count)]
    assert [i for span in spans for i in span] == list(range(length))
    assert max(map(len, spans)) - min(map(len, spans)) <= 1


@given(counts, st.integers(1, 40))
def test_each_micro_batch_counts_once_and_all_ranks_have_as_many(count: int, length: int) -> None:
    turns = [ranks.turns(length) for ranks in all_ranks(count)]
    assert len({len(mine) for mine in turns}) == 1
    assert sorted(i for mine in turns for i, is_own in mine if is_own) == list(range(length))
    assert all(0 <= i < length for mine in turns for i, _ in mine)


def test_without_micro_batches_nobody_has_a_turn() -> None:
    assert [ranks.turns(0) for ranks in all_ranks(3)] == [[], [], []]


@given(counts, st.lists(st.lists(st.integers(), min_size=1, max_size=9), max_size=9))
def test_even_parts_keep_items_and_order(count: int, parts: list[list[int]]) -> None:
    even = Ranks(0, count).even(parts)
    assert list(itertools.chain(*even)) == list(itertools.chain(*parts))
    assert all(even)
    assert len(even) % count == 0 or max(map(len, even)) == 1
    assert Ranks(0, 1).even(parts) == parts


def rows(first: int, count: int) -> Batch:
    """Each row is its own number."""
    ids = torch.arange(first, first + count)[:, None].repeat(1, 3)
    return Batch(ids, torch.ones(count, 3, dtype=torch.bool))


@given(counts, st.integers(1, 30), st.integers(1, 8))
def test_ranks_read_the_rows_that_one_reads(count: int, batch_rows: int, micro_rows: int) -> None:
    """The global batch does not depend on the number of ranks, and no micro-batch is larger than asked."""
    (whole,) = itertools.islice(row_steps(rows, batch_rows, micro_rows)(2, {}, None), 1)
    expected = [int(row) for batch in whole.batches for row in batch.to(torch.device("cpu")).input_ids[:, 0]]
    read = []
    for ranks in all_ranks(count):
        (step,) = itertools.islice(row_steps(rows, batch_rows, micro_rows, ranks)(2, {}, None), 1)
        for batch in step.batches:
            ids = batch.to(torch.device("cpu")).input_ids[:, 0]
            assert len(ids) <= micro_rows
            if not isinstance(batch, Idle):
                read += ids.tolist()
    assert sorted(read) == expected == list(range(2 * batch_rows, 3 * batch_rows))


def test_an_idle_micro_batch_counts_nothing() -> None:
    batches = [rows(0, 2)]
    first, second = (own_batches(ranks, batches) for ranks in all_ranks(2))
    assert first == batches
    (idle,) = second
    assert isinstance(idle, Idle)
    assert idle.num_tokens() == 0
    assert set(idle.denominators().values()) == {0}
    assert idle.denominators().keys() == batches[0].denominators().keys()


@given(counts, st.integers(1, 30))
def test_shares_are_those_of_torch_chunk(count: int, length: int) -> None:
    tensor = torch.arange(length)
    parts = [tensor[rows_of(length, rank, count)] for rank in range(count)]
    for part, expected in itertools.zip_longest(parts, tensor.chunk(count)):
        assert part.tolist() == ([] if expected is None else expected.tolist())


def test_alone_everything_is_said_to_oneself() -> None:
    def work(items: object, first: int) -> object:
        return [items, first]

    assert ALONE.leads
    assert ALONE.gather({"a": 1}) == [{"a": 1}]
    assert ALONE.share((1, 2)) == (1, 2)
    assert ALONE.spread(work, "ab") == ["ab", 0]
    with ALONE.leader_first():
        pass
    ALONE.barrier()
    tensor = torch.ones(2)
    ALONE.add([tensor])
    assert tensor.tolist() == [1, 1]


def test_alone_nothing_is_joined() -> None:
    """Also under `torchrun --nproc-per-node 1`; and one process never imports the modules of several."""
    with joined("cpu", {"WORLD_SIZE": "1", "RANK": "0"}) as ranks:
        assert ranks == ALONE
    assert not torch.distributed.is_initialized()
    code = "import sys, torch; known = set(sys.modules)\nimport fledge.stages.pretrain\n" + (
        "print([n for n in set(sys.modules) - known if n.startswith('torch.distributed')])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    made = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert made.stdout == "[]\n", made.stderr


def test_a_run_of_another_rank_writes_nothing(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", "seed = 0\n", writes=False)
    run.begin({})
    run.log("metrics", {"step": 1})
    run.rewind(0, 0)
    run.prune(1, None)
    assert not (tmp_path / "run").exists()


def test_a_mistake_of_one_part_is_a_mistake_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, the other's answer given by the test."""

    @dataclass(frozen=True)
    class Two(Ranks):
        problem: str | None = None

        def gather(self, value: object) -> list[object]:
            return [value, {"made": [30], "problem": self.problem}]

    def work(items: object, first: int) -> list[int]:
        return [first, 20]

    assert Two(0, 2).spread(work, "abcd") == [0, 20, 30]
    with pytest.raises(UserError, match="row 3 is broken"):
        Two(0, 2, problem="row 3 is broken").spread(work, "abcd")


def test_gradients_of_idle_batches_are_zero() -> None:
    """A pass that does not count leaves no trace, in loss or gradient."""
    from fledge.train.loop import _accumulate
    from fledge.train.losses import Term

    weight = torch.nn.Parameter(torch.ones(()))

    def loss(_forward: object, batch: Batch) -> dict[str, Term]:
        total: Tensor = weight * batch.input_ids.sum()
        return {"loss": Term(total, per="tokens")}

    batch = rows(1, 1)
    sums = _accumulate(lambda: weight, [batch, Idle(batch)], loss, {"tokens": 3}, torch.device("cpu"))
    assert [(name, count, float(value)) for name, count, value in sums] == [("loss", 3, 3.0)]
    assert weight.grad is not None
    assert float(weight.grad) == 1.0
