"""`fledge score`: the rewards that a reward model gives to conversations."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fledge.data.preferences import Ranking, parse_preference
from fledge.data.readers import file_rows
from fledge.data.streams import BadLines
from fledge.device import ComputeName, DeviceName, keep_freed_memory, pick_compute_dtype, pick_device
from fledge.errors import UserError
from fledge.files import write_text
from fledge.rewards.reward_model import Judge, load_judge
from fledge.train.progress import say


@dataclass(frozen=True, kw_only=True)
class Config:
    """Give every conversation its reward: how good its last turn is, by a reward model."""

    model: Path
    """Directory of a reward model."""
    data: Path
    """JSONL or Parquet file of conversations {"messages": [...]}, or of preferences."""
    out: Path | None = None
    """File for the rows with their rewards; by default stdout."""
    skip_long: bool = False
    """Leave out and count rows that are longer than the model reads, instead of ending with an error."""
    device: DeviceName = "auto"
    """Where to run."""
    compute: ComputeName = "auto"
    """Type of matrix products; auto is bf16 where it is fast."""
    overwrite: bool = False
    """Replace what --out holds."""


def main(config: Config) -> None:
    """Write each row with its `reward` (of a preference: `rewards`), in the order of the file."""
    if config.out is not None and config.out.exists() and not config.overwrite:
        raise UserError(f"{config.out}: exists already; choose another --out or pass --overwrite")
    keep_freed_memory()
    device = pick_device(config.device)
    judge = load_judge(config.model, device, pick_compute_dtype(device, config.compute))
    rows = [(where, row, _encoded(judge, row, where)) for where, row in file_rows(config.data, _BAD)]
    if not rows:
        raise UserError(f"{config.data}: holds no conversations")
    fitting = [one for one in rows if max(map(len, one[2])) <= judge.max_tokens]
    skipped = len(rows) - len(fitting)
    if skipped and not config.skip_long:
        where, longest = next((w, n) for w, _, ids in rows if (n := max(map(len, ids))) > judge.max_tokens)
        raise UserError(
            f"{where}: {longest} tokens; the reward model reads {judge.max_tokens}: leave the line out, or "
            f"all {skipped} that are too long with --skip-long"
        )
    rows = fitting
    if not rows:
        raise UserError(f"{config.data}: all {skipped} rows are longer than {judge.max_tokens} tokens")
    rewards = iter(judge.score_ids([ids for _, _, encoded in rows for ids in encoded]))
    scored = [(row, [next(rewards) for _ in encoded]) for _, row, encoded in rows]
    lines = [json.dumps(_with_rewards(row, found), ensure_ascii=False) + "\n" for row, found in scored]
    if config.out is None:
        sys.stdout.write("".join(lines))
    else:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(config.out, "".join(lines))
    console = Console(stderr=True)
    numbers = [reward for _, found in scored for reward in found]
    spread = f", standard deviation {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
    left_out = f"; {skipped:,} rows are too long and left out" if skipped else ""
    say(
        console,
        f"{len(numbers):,} completions, mean reward {statistics.fmean(numbers):+.3f}{spread}{left_out}",
    )


_BAD = BadLines(advice="")


def _encoded(judge: Judge, row: dict[str, Any], where: str) -> list[list[int]]:
    """The ids of all completions of a row."""
    row = {name: value for name, value in row.items() if value is not None}
    try:
        if "messages" in row and not {"chosen", "completions"} & set(row):
            if not isinstance(row["messages"], list) or not isinstance(row.get("tools"), list | None):
                raise UserError('it takes a list in the field "messages", and a list or nothing in "tools"')
            return [judge.encode(row["messages"], row.get("tools"))]
        found = parse_preference(row, where)
        turns = found.completions if isinstance(found, Ranking) else [found.completion]
        return [judge.encode([*found.prompt, *completion], found.tools) for completion in turns]
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(where) else f"{where}: {message}") from None


def _with_rewards(row: dict[str, Any], rewards: list[float]) -> dict[str, Any]:
    rounded = [round(reward, 6) for reward in rewards]
    is_one = len(rewards) == 1 and "completions" not in row
    return {**row, "reward": rounded[0]} if is_one else {**row, "rewards": rounded}
