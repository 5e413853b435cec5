"""Learning-rate schedules as fractions of the peak."""

from __future__ import annotations


def warmup_stable_decay(step: int, total: int | None, warmup: int, decay_share: float) -> float:
    """Rise linearly over `warmup` steps, stay at 1, fall linearly to 0 over the last `decay_share` of all.

    `step` counts from 0. `total` None: not known yet, no decay. (Hu et al. 2024, MiniCPM.)
    """
    rise = min(1.0, (step + 1) / max(1, warmup))
    if total is None:
        return rise
    decay = max(1, round(total * decay_share))
    return min(rise, max(0.0, (total - step) / decay))
