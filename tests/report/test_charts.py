"""What charts are drawn from: few points, and means over neighbours."""

from __future__ import annotations

import pytest

from fledge.report.charts import running_mean, thinned


def test_thinned_keeps_the_ends_and_the_order() -> None:
    values = [float(i) for i in range(10_000)]
    kept = thinned(values, 600)
    assert len(kept) == 600 and kept[0] == 0 and kept[-1] == 9999
    assert kept == sorted(set(kept))
    assert thinned([3.0, 1.0], 600) == [3.0, 1.0]


def test_running_mean_by_hand() -> None:
    assert running_mean([1.0, 2.0, 6.0, 1.0], 3) == pytest.approx([1.5, 3.0, 3.0, 3.5])
    assert running_mean([5.0], 3) == [5.0]
