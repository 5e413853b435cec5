"""The training loop: what a step computes, when it stops, and that no interruption can be told afterwards."""

from __future__ import annotations

import itertools
import math
import shutil
import signal
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import fledge.model.checkpoint
import fledge.train.checkpoints
from fledge.errors import UserError
from fledge.model.checkpoint import save_model
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.run import Run
from fledge.train.divergence import Diverged
from fledge.train.loop import fit
from fledge.train.losses import Forward, Term, next_token_loss
from fledge.train.optim import make_optimizers
from fledge.train.plan import FitConfig
from fledge.train.steps import Metrics, Step, Steps, row_steps
from fledge.types import Batch

VOCAB_SIZE = 30
LossFn = Callable[[Forward, Batch], dict[str, Term]]


class NoTokenizer:
    """Takes a tokenizer's place in `save_model`."""

    def save(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}", encoding="utf-8")


def tiny_model(seed: int = 0) -> CausalLM:
    model = CausalLM(ModelConfig("qwen3", VOCAB_SIZE, 16, 24, 1, 2, 1, 8, 32))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return model


def random_rows(first: int, count: int, length: int = 9) -> Batch:
    """Rows of an endless sequence; each has another number of targets."""
    ids, mask = [], []
    for row in range(first, first + count):
        generator = torch.Generator().manual_seed(row)
        ids.append(torch.randint(VOCAB_SIZE, (length,), generator=generator))
        mask.append(torch.rand(length, generator=generator) < (row % 4 + 1) / 5)
        mask[-1][-1] = True
    return Batch(torch.stack(ids), torch.stack(mask))


@dataclass
class Training:
    """A small run, described: `fit` makes or resumes it."""

    directory: Path
    steps: Steps = field(default_factory=lambda: row_steps(random_rows, 4, 2))
    loss_fn: LossFn = next_token_loss
    evaluate: Callable[[int], Metrics] | None = None
    lr: float = 0.01
    config: FitConfig = field(
        default_factory=lambda: FitConfig(label="tiny", total_steps=12, warmup_steps=3, evaluations=4)
    )

    def __post_init__(self) -> None:
        self.model = tiny_model()
        self.run = Run.open(self.directory, "seed = 0\n")

    def fit(self) -> dict[str, Any]:
        self.run.begin({})
        optimizers = make_optimizers(self.model, "muon", self.lr, self.lr, 0.0)
        return fit(
            self.model,
            optimizers,
            self.steps,
            self.loss_fn,
            self.config,
            self.run,
            self.write_model,
            self.evaluate,
        )

    def write_model(self, directory: Path, tokens: int) -> None:
        save_model(directory, self.model, NoTokenizer(), {"tokens": tokens}, [0])

    def weights(self) -> bytes:
        return b"".join(p.detach().numpy().tobytes() for p in self.model.parameters())

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl without what a clock says."""
        clock = ("seconds", "tokens_per_second")
        return [{k: v for k, v in row.items() if k not in clock} for row in self.run.rows("metrics")]

    def train_steps(self) -> list[int]:
        return [row["step"] for row in self.metrics() if "lr" in row]

    def evaluated_steps(self) -> list[int]:
        return [row["step"] for row in self.metrics() if "lr" not in row]

    def saved_steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self.run.checkpoints()]


def on_step(number: int, do: Callable[[], None]) -> Steps:
    """The usual steps; `do` is called before the one of that number (from 1) is made."""

    def steps(first: int, *before: Any) -> Generator[Step, Metrics | None, None]:
        usual = row_steps(random_rows, 4, 2)(first, *before)
        for step in itertools.count(first + 1):
            if step == number:
                do()
            yield next(usual)

    return steps


# What a step computes.


@pytest.mark.parametrize("micro_rows", [1, 3, 8])
def test_micro_batches_add_up_to_the_big_batch(micro_rows: int, tmp_path: Path) -> None:
    """Loss and gradient are those of the mean over all targets of the step, computed here in one piece."""
    batch = random_rows(0, 8)
    reference = tiny_model()
    targets = batch.input_ids[:, 1:][batch.loss_mask[:, 1:]]
    logits = reference(batch.input_ids[:, :-1])[batch.loss_mask[:, 1:]]
    loss = F.cross_entropy(logits, targets)
    loss.backward()

    model = tiny_model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    descent = torch.optim.SGD(model.parameters(), lr=1.0)  # one step's change is the gradient
    descent.param_groups[0]["peak_lr"] = 1.0
    run = Run.open(tmp_path, "")
    run.begin({})
    config = FitConfig(label="one", total_steps=1, warmup_steps=0, decay_share=1.0, max_grad_norm=math.inf)
    steps = row_steps(random_rows, 8, micro_rows)
    fit(model, [descent], steps, next_token_loss, config, run, lambda directory, tokens: None)

    (row,) = run.rows("metrics")
    assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert row["tokens"] == batch.num_tokens()
    for name, parameter in reference.named_parameters():
        change = start[name] - dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(change, parameter.grad, atol=1e-6, rtol=1e-4)


def test_gradients_are_clipped_together(tmp_path: Path) -> None:
    training = Training(
        tmp_path, config=FitConfig(label="x", total_steps=1, warmup_steps=0, max_grad_norm=0.01)
    )
    start = training.weights()
    norms: list[float] = []
    optimizers = make_optimizers(training.model, "adamw", 1.0, 1.0, 0.0)
    optimizers[0].register_step_pre_hook(
        lambda *_: norms.append(
            math.sqrt(
                sum(float(p.grad.square().sum()) for p in training.model.parameters() if p.grad is not None)
            )
        )
    )
    training.run.begin({})
    fit(
        training.model,
        optimizers,
        training.steps,
        next_token_loss,
        training.config,
        training.run,
        training.write_model,
    )
    assert norms == [pytest.approx(0.01, rel=1e-3)]
    assert training.metrics()[0]["grad_norm"] > 0.1  # as it was before
    assert training.weights() != start


@pytest.mark.parametrize("micro_rows", [1, 2, 3, 5, 7])
def test_a_step_reads_its_rows_once_and_in_order(micro_rows: int) -> None:
    calls: list[tuple[int, int]] = []

    def rows(first: int, count: int) -> Batch:
        calls.append((first, count))
        return random_rows(first, count)

    (step,) = itertools.islice(row_steps(rows, 5, micro_rows)(3, {}, None), 1)
    assert len(step.batches) == math.ceil(5 / micro_rows)
    assert [row for first, count in calls for row in range(first, first + count)] == list(range(15, 20))
    assert max(count for _, count in calls) <= micro_rows


def test_a_step_without_targets_is_skipped_and_counted(tmp_path: Path) -> None:
    def rows(first: int, count: int) -> Batch:
        batch = random_rows(first, count)
        if first // 4 in (0, 5) or first % 4 == 0:  # the first and the sixth step
            batch.loss_mask[:] = False
        return batch

    weights: list[bytes] = []

    def recorded(first: int, *before: Any) -> Generator[Step, Metrics | None, None]:
        for step in row_steps(rows, 4, 2)(first, *before):
            weights.append(training.weights())
            yield step

    training = Training(tmp_path, steps=recorded)
    done = training.fit()
    weights.append(training.weights())
    assert done["skipped_steps"] == 2
    assert done["steps"] == 12
    unchanged = [
        i for i, (before, after) in enumerate(itertools.pairwise(weights), start=1) if before == after
    ]
    assert unchanged == [1, 6]
    skipped = [row for row in training.metrics() if "skipped" in row]
    assert [row["step"] for row in skipped] == [1, 6]
    assert all("loss" not in row for row in skipped)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_only_skipped_steps_are_no_error(tmp_path: Path) -> None:
    def rows(first: int, count: int) -> Batch:
        batch = random_rows(first, count)
        return replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))

    done = Training(tmp_path, steps=row_steps(rows, 4, 2)).fit()
    assert done["skipped_steps"] == 12
    assert done["loss"] is None


def test_terms_without_weight_are_only_reported(tmp_path: Path) -> None:
    def loss_fn(forward: Forward, batch: Batch) -> dict[str, Term]:
        rows = torch.tensor(float(batch.input_ids.shape[0]), requires_grad=True)
        return {**next_token_loss(forward, batch), "one": Term(rows, per="sequences", weight=0.0)}

    plain, reporting = Training(tmp_path / "a"), Training(tmp_path / "b", loss_fn=loss_fn)
    plain.fit()
    reporting.fit()
    assert {row["one"] for row in reporting.metrics()} == {1.0}
    assert reporting.weights() == plain.weights()


def test_the_schedule_is_followed(tmp_path: Path) -> None:
    training = Training(
        tmp_path, lr=0.6, config=FitConfig("x", total_steps=10, warmup_steps=3, decay_share=0.4)
    )
    training.fit()
    rates = [row["lr"] / 0.6 for row in training.metrics()]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4])


# When it stops.


def spoiled(step: int, value: float) -> LossFn:
    """The usual loss, with `value` nats added for each target of one step (from 1)."""
    calls = itertools.count()

    def loss_fn(forward: Forward, batch: Batch) -> dict[str, Term]:
        term = next_token_loss(forward, batch)["loss"]
        extra = value * batch.denominators()["tokens"] if next(calls) // 2 + 1 == step else 0.0
        return {"loss": replace(term, sum=term.sum + extra)}

    return loss_fn


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("value", [math.nan, math.inf, 50.0])
@pytest.mark.parametrize(
    ("step", "good"),
    # Saved after 3, 6, 9. What is saved after step 6 is what failed in step 7.
    [(7, "step_000003"), (8, "step_000006"), (4, None)],
)
def test_it_stops_at_a_bad_loss(value: float, step: int, good: str | None, tmp_path: Path) -> None:
    training = Training(tmp_path, loss_fn=spoiled(step, value))
    saves: dict[str, bytes] = {}
    training.steps = on_step(step, lambda: saves.update(snapshot(tmp_path / "checkpoints")))
    with pytest.raises(Diverged) as error:
        training.fit()
    message = str(error.value)
    assert message.startswith(
        f"step {step}: the loss jumped to" if value == 50.0 else f"step {step}: loss is {value}"
    )
    if good:
        assert message.count("checkpoints") == 1
        assert str(tmp_path / "checkpoints" / good) in message
    else:
        assert "no good checkpoint was saved yet" in message
    assert "learning rate" in message
    assert "\n" not in message
    assert snapshot(tmp_path / "checkpoints") == saves
    assert training.train_steps() == list(range(1, step))


def test_the_warmup_may_jump(tmp_path: Path) -> None:
    training = Training(tmp_path, loss_fn=spoiled(3, 50.0))
    assert training.fit()["steps"] == 12


def test_a_spike_may_be_allowed(tmp_path: Path) -> None:
    training = Training(tmp_path, loss_fn=spoiled(7, 50.0))
    training.config = replace(training.config, max_spike=60.0)
    assert training.fit()["steps"] == 12


def test_it_stops_at_a_bad_gradient(tmp_path: Path) -> None:
    training = Training(tmp_path)
    calls = itertools.count(1)
    training.model.model.norm.weight.register_hook(lambda grad: grad * math.nan if next(calls) == 9 else None)
    with pytest.raises(
        Diverged, match=r"step 5: grad_norm is nan; the last good checkpoint is .*step_000003;"
    ):
        training.fit()


def test_damaged_weights_are_never_saved(tmp_path: Path) -> None:
    """The loss of a step says nothing about what its own update did."""
    training = Training(tmp_path)

    def damage() -> None:
        with torch.no_grad():
            training.model.model.norm.weight[3] = math.nan

    training.loss_fn = lambda forward, batch: {  # finite whatever the weights are
        "loss": Term(training.model.model.embed_tokens.weight.sum() * 0.0, per="tokens")
    }
    training.steps = on_step(6, damage)
    training.model.model.norm.weight.requires_grad_(False)
    with pytest.raises(
        Diverged, match=r"step 6: the update made .*; the last good checkpoint is .*step_000003;"
    ):
        training.fit()
    assert training.saved_steps() == [3]


def test_settings_that_make_no_sense_name_their_flag() -> None:
    good = FitConfig(label="x", total_steps=1)
    for name, value in {
        "minutes": 0.0, "warmup_steps": -1, "decay_share": 1.5, "max_spike": math.nan, "evaluations": 0,
        "keep_checkpoints": 0,
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}: must be "):
            replace(good, **{name: value})


# What is saved, and when.


def test_saves_and_evaluations_are_spread_evenly(tmp_path: Path) -> None:
    training = Training(tmp_path, evaluate=lambda step: {"validation": 1.0})
    training.config = replace(training.config, total_steps=10, evaluations=4, keep_checkpoints=99)
    training.fit()
    assert training.evaluated_steps() == [0, 3, 5, 8, 10]
    assert training.saved_steps() == [3, 5, 8, 10]
    assert training.train_steps() == list(range(1, 11))


def test_every_checkpoint_is_a_model(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.fit()
    last = training.run.checkpoints()[-1]
    saved = load_file(last.path / "model.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in training.model.named_parameters())
    assert (last.path / "lineage.json").read_text().split() == [
        "{",
        '"tokens":',
        str(last.state["tokens"]),
        "}",
    ]


def test_a_failing_evaluation_comes_after_the_save(tmp_path: Path) -> None:
    reference = Training(tmp_path / "a", evaluate=lambda step: {"validation": 1.0})
    reference.fit()

    def evaluate(step: int) -> Metrics:
        if step == 6:
            raise RuntimeError("out of memory")
        return {"validation": 1.0}

    training = Training(tmp_path / "b", evaluate=evaluate)
    with pytest.raises(RuntimeError, match="out of memory"):
        training.fit()
    assert training.saved_steps() == [3, 6]
    # The same command again makes up for it.
    again = Training(tmp_path / "b", evaluate=lambda step: {"validation": 1.0})
    again.fit()
    assert again.metrics() == reference.metrics()
    assert again.weights() == reference.weights()


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    validation = {0: 0.1, 2: 5.0, 4: 3.0, 6: 4.0, 8: math.nan, 10: 3.0, 12: 6.0}
    training = Training(tmp_path, evaluate=lambda step: {"validation": validation[step]})
    training.config = replace(training.config, evaluations=6, keep_checkpoints=2)
    done = training.fit()
    assert training.saved_steps() == [4, 10, 12]
    assert done["best_step"] == 4  # the untrained model is no checkpoint; of equals the first
    assert Training(tmp_path).fit()["best_step"] == 4


def test_saves_come_only_where_the_generator_allows(tmp_path: Path) -> None:
    def steps(first: int, *before: Any) -> Generator[Step, Metrics | None, None]:
        usual = row_steps(random_rows, 4, 2)(first, *before)
        for number in itertools.count(first + 1):
            yield replace(next(usual), may_save=number % 5 == 0)

    training = Training(tmp_path, steps=steps, evaluate=lambda step: {"validation": 1.0})
    training.config = replace(training.config, keep_checkpoints=99)
    training.fit()
    # Due after 3, 6, 9, 12; put off to the next border, and to the end, where nothing is left to disturb.
    assert training.saved_steps() == [5, 10, 12]
    assert training.evaluated_steps() == [0, 5, 10, 12]


def test_the_generator_gets_metrics_and_its_state_back(tmp_path: Path) -> None:
    got: list[Metrics | None] = []
    began: list[tuple[Any, ...]] = []

    def steps(first: int, *before: Any) -> Generator[Step, Metrics | None, None]:
        began.append((first, *before))
        usual = row_steps(random_rows, 4, 2)(first, *before)
        for number in itertools.count(first + 1):
            got.append((yield replace(next(usual), state={"cursor": 10 * number, "beta": 0.1 + 0.2})))

    training = Training(tmp_path, steps=steps)
    training.fit()
    rows = training.metrics()
    assert got == [{"loss": row["loss"], "grad_norm": row["grad_norm"]} for row in rows[:-1]]
    shutil.rmtree(training.run.checkpoints()[-1].path)
    Training(tmp_path, steps=steps).fit()
    assert began == [(0, {}, None), (9, {"cursor": 90, "beta": 0.1 + 0.2}, got[8])]


def adaptive(interrupted_at: int | None = None) -> tuple[Steps, list[float]]:
    """Steps of rows that depend on the losses of all steps before, and what decides on them, step by step."""
    made: list[float] = []

    def steps(
        first: int, state: dict[str, Any], metrics: Metrics | None
    ) -> Generator[Step, Metrics | None, None]:
        beta = state.get("beta", 0.1)
        for number in itertools.count(first + 1):
            if metrics is not None:
                beta = 0.9 * beta + metrics["loss"] * metrics["grad_norm"]
            made.append(beta)
            if number == interrupted_at:
                signal.raise_signal(signal.SIGINT)
            row = int(1e6 * beta) % 1000
            metrics = yield Step([random_rows(row, 4)], state={"beta": beta})

    return steps, made


@pytest.mark.parametrize("step", [1, 5, 6, 11])
def test_a_generator_that_adapts_does_not_notice_an_interruption(step: int, tmp_path: Path) -> None:
    steps, expected = adaptive()
    reference = Training(tmp_path / "a", steps=steps)
    reference.fit()
    steps, before = adaptive(interrupted_at=step)
    with pytest.raises(KeyboardInterrupt):
        Training(tmp_path / "b", steps=steps).fit()
    steps, after = adaptive()
    again = Training(tmp_path / "b", steps=steps)
    again.fit()
    assert len(before) == step
    assert before + after == expected
    assert again.metrics() == reference.metrics()
    assert again.weights() == reference.weights()


def five_steps(first: int, *before: Any) -> Generator[Step, Metrics | None, None]:
    """As if the data were used up after five of the twelve steps."""
    usual = row_steps(random_rows, 4, 2)(first, *before)
    for _ in range(first, 5):
        yield next(usual)


@pytest.mark.parametrize(("border", "kept"), [(1, 5), (2, 4)])
def test_a_generator_that_fails_loses_only_what_no_save_may_follow(
    border: int, kept: int, tmp_path: Path
) -> None:
    """Five steps are taken, then it fails, as a reward may; mended, the run ends as if it had not."""
    broken = True

    def steps(
        first: int, _state: dict[str, Any], _metrics: Metrics | None
    ) -> Generator[Step, Metrics | None, None]:
        for number in range(first, 12):
            if broken and number == 5:
                raise UserError("the reward failed")
            yield Step([random_rows(4 * number, 4)], may_save=(number + 1) % border == 0)

    training = Training(tmp_path / "run", steps=steps)
    with pytest.raises(UserError, match="the reward failed"):
        training.fit()
    assert training.run.checkpoints()[-1].step == kept
    broken = False
    again = Training(tmp_path / "run", steps=steps)
    again.fit()
    whole = Training(tmp_path / "whole", steps=steps)
    whole.fit()
    for name, weight in again.model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name])


def test_a_generator_that_ends_early_ends_the_run(tmp_path: Path) -> None:
    training = Training(tmp_path, steps=five_steps, evaluate=lambda step: {"validation": 1.0})
    done = training.fit()
    assert done["steps"] == 5
    assert training.saved_steps() == [3, 5]
    assert training.evaluated_steps() == [0, 3, 5]
    before = snapshot(tmp_path)
    again = Training(tmp_path, steps=five_steps, evaluate=lambda step: {"validation": 2.0})
    assert again.fit() == done
    assert snapshot(tmp_path) == before


def test_an_interrupt_in_the_last_step_of_a_generator_loses_no_evaluation(tmp_path: Path) -> None:
    def interrupted(first: int, *before: Any) -> Generator[Step, Metrics | None, None]:
        for number, step in enumerate(five_steps(first, *before), start=1):
            if number == 5:
                signal.raise_signal(signal.SIGINT)
            yield step

    training = Training(tmp_path, steps=interrupted, evaluate=lambda step: {"validation": 1.0})
    with pytest.raises(KeyboardInterrupt):
        training.fit()
    assert (training.saved_steps(), training.evaluated_steps()) == ([3, 5], [0, 3])
    again = Training(tmp_path, steps=five_steps, evaluate=lambda step: {"validation": 1.0})
    again.fit()
    assert (again.saved_steps(), again.evaluated_steps()) == ([3, 5], [0, 3, 5])


# Interruptions.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = {"evaluate": lambda step: {"validation": 1.0 / (1 + step)}}
    reference = Training(tmp_path / "a", **evaluate)
    reference.fit()
    training = Training(tmp_path / "b", steps=on_step(5, lambda: signal.raise_signal(number)), **evaluate)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        training.fit()
    assert signal.getsignal(number) is before
    assert training.saved_steps() == [3, 5]
    assert "step 5 is saved; run the same command again to go on" in capsys.readouterr().err
    again = Training(tmp_path / "b", **evaluate)
    again.fit()
    assert "going on from step 5" in capsys.readouterr().err
    assert again.weights() == reference.weights()
    assert again.metrics() == reference.metrics()
    assert again.saved_steps() == reference.saved_steps()


def test_an_interrupt_waits_for_a_border(tmp_path: Path) -> None:
    def steps(first: int, *before: Any) -> Generator[Step, Metrics | None, None]:
        usual = on_step(5, lambda: signal.raise_signal(signal.SIGINT))(first, *before)
        for number in itertools.count(first + 1):
            yield replace(next(usual), may_save=number % 4 == 0)

    training = Training(tmp_path, steps=steps)
    with pytest.raises(KeyboardInterrupt):
        training.fit()
    assert training.saved_steps() == [4, 8]


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    training = Training(tmp_path, steps=on_step(5, twice))
    with pytest.raises(KeyboardInterrupt):
        training.fit()
    assert training.saved_steps() == [3]


class Killed(BaseException):
    """The process is gone: not even `finally` gets to do anything to the disk."""


class DeadlyDisk:
    """Ends the process before the n-th change to the disk."""

    def __init__(self, patched: pytest.MonkeyPatch, operations: float) -> None:
        self.left = operations
        self.count = 0
        for owner, name in (
            (Path, "rename"),
            (Path, "replace"),
            (Path, "unlink"),
            (Path, "mkdir"),
            (shutil, "rmtree"),
            (Run, "log"),
            (fledge.train.checkpoints, "save_file"),
            (fledge.model.checkpoint, "save_file"),
        ):
            patched.setattr(owner, name, self.deadly(getattr(owner, name)))

    def deadly(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count > self.left:
                raise Killed
            return function(*args, **kwargs)

        return call


def test_killed_before_any_change_to_the_disk_it_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every moment at which the disk is about to change, one after the other; then the same command again."""

    def training(directory: Path) -> Training:
        def evaluate(step: int) -> Metrics:
            value = float(made.model.model.norm.weight.detach().square().sum())
            made.run.log("samples", {"step": step, "text": f"{value}\u2028"})
            return {"validation": value}

        made = Training(directory, evaluate=evaluate)
        made.config = replace(made.config, total_steps=7, evaluations=3, keep_checkpoints=1)
        return made

    reference = training(tmp_path / "reference")
    with monkeypatch.context() as patched:
        disk = DeadlyDisk(patched, math.inf)
        reference.fit()
    assert disk.count > 60
    assert reference.evaluated_steps() == [0, 3, 5, 7]
    for operations in range(disk.count):
        directory = tmp_path / str(operations)
        with monkeypatch.context() as patched, pytest.raises(Killed):
            DeadlyDisk(patched, operations)
            training(directory).fit()
        again = training(directory)
        again.fit()
        assert again.weights() == reference.weights(), operations
        assert again.metrics() == reference.metrics(), operations
        assert again.run.rows("samples") == reference.run.rows("samples"), operations
        assert again.saved_steps() == reference.saved_steps(), operations
        assert sorted(path.name for path in directory.iterdir()) == sorted(
            path.name for path in (tmp_path / "reference").iterdir()
        )


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    training = Training(tmp_path, evaluate=lambda step: {"validation": 1.0})
    first = training.fit()
    before = snapshot(tmp_path)
    again = Training(tmp_path, evaluate=lambda step: {"validation": 2.0})
    assert again.fit() == first
    assert again.weights() == training.weights()
    assert snapshot(tmp_path) == before


# A run by the clock.


class Clock:
    """A clock on which every step takes 2 seconds."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        patched.setattr(time, "perf_counter", lambda: self.now)

    def steps(self, first: int, *before: Any) -> Generator[Step, Metrics | None, None]:
        for step in row_steps(random_rows, 4, 2)(first, *before):
            self.now += 2.0
            yield step


def test_minutes_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def evaluate(step: int) -> Metrics:
        clock.now += 6.0
        return {"validation": 1.0}

    training = Training(tmp_path, steps=clock.steps, evaluate=evaluate)
    training.config = replace(training.config, total_steps=None, minutes=3.0, evaluations=3)
    training.fit()
    assert clock.now == pytest.approx(180, rel=0.05)
    assert len(training.evaluated_steps()) == 1 + 3


@pytest.mark.parametrize("killed_at", [5, 13, 20, 50])
def test_the_number_of_steps_is_measured_once(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what was done before the measurement ended is repeated as it was: without decay, without saves."""
    clock = Clock(monkeypatch)
    config = FitConfig("x", total_steps=None, minutes=2.0, warmup_steps=3, decay_share=0.9, evaluations=20)
    Training(tmp_path / "a", steps=clock.steps, config=config).fit()
    reference = Training(tmp_path / "a", config=config)

    def killed(first: int, *before: Any) -> Generator[Step, Metrics | None, None]:
        usual = clock.steps(first, *before)
        for _ in range(killed_at):
            yield next(usual)
        raise Killed

    with pytest.raises(Killed):
        Training(tmp_path / "b", steps=killed, config=config).fit()
    if not (tmp_path / "b" / "plan.json").exists():
        assert killed_at == 5
        return
    shutil.rmtree(tmp_path / "b" / "checkpoints", ignore_errors=True)  # the disk was slower than the process
    again = Training(tmp_path / "b", config=config)
    again.fit()
    assert len(again.train_steps()) == 60
    assert again.metrics() == reference.metrics()
    assert again.saved_steps() == reference.saved_steps()
