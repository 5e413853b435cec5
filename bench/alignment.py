"""Seconds of a step of PPO, DPO and GRPO on the CPU: fledge beside TRL, in one run.

    python bench/alignment.py --trl PYTHON --trl18 PYTHON [--preload libtcmalloc_minimal.so.4]
                              [--only SUBSTRING;...] [--rounds 4] [--steps 2]

A model of 12M parameters with random weights, the same in both; prompts of 32 tokens, completions of 64
that never end earlier. A step of PPO: 16 prompts, one epoch, one minibatch; reference, value and reward
model. Of DPO: 16 pairs, and what the reference says of them; what is worked out ahead counts with its share
of an epoch. Of GRPO: 2 prompts with 8 completions each, beta 0.04. fledge's steps are those of its verbs,
with their defaults otherwise.

`--trl18`: a Python with TRL 1.8, the last with a PPOTrainer (`trl.experimental.ppo`); `--trl`: one with TRL
1.16. "as shipped" are TRL's defaults, bf16 and checkpointed activations; the others keep their activations.
`--preload` names a memory allocator that TRL is also tried with; fledge takes none. Every variant is a
process of its own that warms up alone and then waits; rounds are interleaved; medians and ranges are shown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

PROMPT_TOKENS, NEW_TOKENS, VOCABULARY, CONTEXT = 32, 64, 4096, 128
WIDTH, INNER, LAYERS, HEADS = 384, 1024, 6, 6
BATCH, GROUPS, SAMPLES, PAIRS, BETA = 16, 2, 8, 128, 0.04
ROWS = {"PPO": BATCH, "DPO": 2 * BATCH, "GRPO": GROUPS * SAMPLES}


@dataclass(frozen=True)
class Variant:
    task: str
    who: str
    dtype: str = "bf16"
    shipped: bool = False
    precomputed: bool = False
    preload: bool = False

    def words(self) -> str:
        if self.who == "fledge":
            return f"{self.task}: fledge"
        more = ["as shipped"] * self.shipped + ["precomputed reference"] * self.precomputed
        return ", ".join([f"{self.task}: TRL {self.dtype}", *more, *["allocator"] * self.preload])


def variants(has_preload: bool) -> Iterator[Variant]:
    for task in ROWS:
        if task != "PPO":  # its trainer checkpoints nothing
            yield Variant(task, "TRL", shipped=True)
        yield Variant(task, "TRL", "fp32")
        yield Variant(task, "TRL")
        if task == "DPO":
            yield Variant(task, "TRL", precomputed=True, preload=has_preload)
        elif has_preload:
            yield Variant(task, "TRL", preload=True)
        yield Variant(task, "fledge")


class Turns:
    """The worker's side: says the seconds of the steps it was asked for, waits, and goes on when told."""

    def __init__(self, out: int) -> None:
        self.out, self.left, self.asked = out, 2, 2
        self.started: float | None = None
        self.parts: dict[str, float] = {}
        self.ahead = 0.0
        """Seconds that a step has cost before."""

    def __call__(self) -> None:
        """A step begins."""
        if self.started is not None:
            self.left -= 1
        if self.left == 0:
            seconds = (time.perf_counter() - (self.started or 0.0)) / self.asked + self.ahead
            parts = {name: total / self.asked for name, total in self.parts.items()}
            if self.ahead:
                parts["reference"] = self.ahead
            os.write(self.out, (json.dumps({"seconds": seconds, "parts": parts}) + "\n").encode())
            line = sys.stdin.readline()
            if not line:
                raise SystemExit
            self.left = self.asked = int(line)
            self.started = None
        if self.started is None:
            self.parts.clear()
            self.started = time.perf_counter()

    def clocked(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with the seconds it takes added to a part."""

        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - started

        return call


def random_ids(rows: int, tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    found: list[list[int]] = torch.randint(2, VOCABULARY, (rows, tokens), generator=generator).tolist()
    return found


# fledge.


def our_model(seed: int) -> Any:
    from fledge.model.config import ModelConfig
    from fledge.model.transformer import CausalLM

    head = WIDTH // HEADS
    config = ModelConfig(
        "qwen3", VOCABULARY, WIDTH, INNER, LAYERS, HEADS, HEADS, head, CONTEXT, tie_word_embeddings=True
    )
    model = CausalLM(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def our_prompts() -> list[Any]:
    from fledge.data.prompts import Prompt
    from fledge.train.prompts import EncodedPrompt

    rows = random_ids(PAIRS, PROMPT_TOKENS)
    asked = [Prompt([{"role": "user", "content": str(i)}], None, {}, f"bench:{i}") for i in range(PAIRS)]
    return [EncodedPrompt(prompt, ids) for prompt, ids in zip(asked, rows, strict=True)]


def our_tokenizer() -> Any:
    """As many ids as the model has."""
    from fledge.tokenizer.bpe import train_bpe

    rows = random_ids(4000, 20)
    return train_bpe([" ".join(f"{token_id:x}" for token_id in row) for row in rows], VOCABULARY)


def our_fit(turns: Turns, model: Any, steps: Any, loss: Any, stage: Any, forward: Any = None) -> None:
    """The training loop, with the stage's defaults, for ever."""
    from fledge.device import pick_compute_dtype
    from fledge.run import Run
    from fledge.train.loop import fit
    from fledge.train.optim import make_optimizers
    from fledge.train.plan import FitConfig

    def in_turn(first: int, state: dict[str, Any], metrics: Any) -> Any:
        inner, answer = steps(first, state, metrics), None
        while True:
            turns()
            answer = yield replace(inner.send(answer), may_save=False)

    dtype = pick_compute_dtype(torch.device("cpu"), stage.compute)
    plan = FitConfig.of(replace(stage, max_spike=1e9), label="bench", total_steps=10**6, compute_dtype=dtype)
    optimizers = make_optimizers(model, "adamw", 1.0, stage.adam_lr, stage.weight_decay)
    with tempfile.TemporaryDirectory() as folder:
        run = Run.open(Path(folder) / "run", "")
        run.begin({})
        fit(model, optimizers, in_turn, loss, plan, run, lambda _directory, _tokens: None, None, forward)


def our_ppo(turns: Turns) -> None:
    from fledge.device import pick_compute_dtype
    from fledge.model.heads import RewardModel
    from fledge.rewards.reward_model import Judge
    from fledge.stages.ppo import Config
    from fledge.train import ppo
    from fledge.train.actor_critic import ActorCritic, Critic, reference_of
    from fledge.train.experience import Settings, World

    World.play = turns.clocked("generation", World.play)  # type: ignore[method-assign]
    ppo.experience_of = turns.clocked("scoring", ppo.experience_of)
    stage = Config(
        model=Path(), prompts=(), reward=(), rollouts=10**6, batch_prompts=BATCH, max_tokens=NEW_TOKENS,
        epochs=1, minibatches=1,
    )  # fmt: skip
    settings = Settings(**{field.name: getattr(stage, field.name) for field in fields(Settings)})
    dtype = pick_compute_dtype(torch.device("cpu"), stage.compute)
    tokenizer = our_tokenizer()
    drawn = torch.Generator().manual_seed(0)
    judge = Judge(RewardModel(our_model(2), drawn).eval().requires_grad_(False), tokenizer, 0.0, dtype)
    actor = ActorCritic(our_model(0), Critic(RewardModel(our_model(1), drawn), 0.0), stage.temperature)
    world = World(
        actor, reference_of(actor, our_model(0).requires_grad_(False)), tokenizer, (),
        lambda rollouts: judge.score_ids([rollout.input_ids for rollout in rollouts]), settings, dtype,
        stage.decode_rows,
    )  # fmt: skip
    steps = ppo.ppo_steps(world, our_prompts(), None, lambda _kl: None)
    our_fit(turns, actor, steps, partial(ppo.ppo_loss, settings=settings), stage, actor)


def our_dpo(turns: Turns) -> None:
    from fledge.data.comparisons import Comparison, Pair
    from fledge.device import pick_compute_dtype
    from fledge.stages.dpo import Config
    from fledge.train.comparisons import Plan, comparison_steps
    from fledge.train.dpo import Objective, Reference, preference_batches, scoring_of

    stage, model = Config(model=Path(), data=()), our_model(0)
    prompts = random_ids(PAIRS, PROMPT_TOKENS)
    said = iter(random_ids(2 * PAIRS, NEW_TOKENS))
    mask = [False] * PROMPT_TOKENS + [True] * NEW_TOKENS
    chosen = [
        Comparison(str(i), [], [[]] * 2, [ids + next(said), ids + next(said)], [mask] * 2, [Pair(0, 1)])
        for i, ids in enumerate(prompts)
    ]
    objective = Objective(stage.loss, stage.beta or 0.1)
    plan = Plan(stage.batch_prompts, stage.micro_batch_tokens, 10**6, stage.seed)
    scoring = scoring_of(model, pick_compute_dtype(torch.device("cpu"), stage.compute))
    refer = turns.clocked("reference", scoring.logps)

    def batches(parts: list[list[Comparison]]) -> Any:
        # The verb reads all of them before the first step: the same passes, once for each prompt.
        rows = {one.key: logps for part in parts for one, logps in zip(part, refer(part), strict=True)}
        return preference_batches(scoring, objective, Reference(rows, {}), parts, plan.micro_tokens)

    our_fit(turns, model, comparison_steps(plan, chosen, batches), objective.loss, stage)


def our_grpo(turns: Turns) -> None:
    from fledge.device import pick_compute_dtype
    from fledge.rewards.verifiers import Reward
    from fledge.stages.grpo import Config
    from fledge.train import grpo
    from fledge.train.groups import Settings, World

    World.play = turns.clocked("generation", World.play)  # type: ignore[method-assign]
    World.judge = turns.clocked("scoring", World.judge)  # type: ignore[method-assign]
    World.read = turns.clocked("scoring", World.read)  # type: ignore[method-assign]
    stage = Config(
        model=Path(), prompts=(), reward=(), rollouts=10**6, batch_prompts=GROUPS, samples=SAMPLES,
        max_tokens=NEW_TOKENS, epochs=1, minibatches=1, beta=BETA, adam_lr=3e-5,
    )  # fmt: skip
    settings = Settings(**{field.name: getattr(stage, field.name) for field in fields(Settings)})
    dtype = pick_compute_dtype(torch.device("cpu"), stage.compute)
    policy, frozen = our_model(0), our_model(0).requires_grad_(False)
    reward = Reward("even", 1.0, lambda rollouts: even([one.input_ids[PROMPT_TOKENS:] for one in rollouts]))
    world = World(policy, frozen, our_tokenizer(), (), [reward], settings, dtype, stage.decode_rows)
    steps = grpo.grpo_steps(world, our_prompts(), lambda _kl: None, lambda _number, _figures: None)
    our_fit(turns, policy, steps, partial(grpo.grpo_loss, settings=settings), stage, policy)


def even(completions: list[list[int]]) -> list[float]:
    """A reward: the share of even ids."""
    return [sum(token_id % 2 == 0 for token_id in ids) / len(ids) for ids in completions]


# TRL.


def their_config(**more: Any) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=WIDTH // HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        **more,
    )


def their_model(folder: str) -> Any:
    """Saved and loaded: trainers look for a reference where the model came from."""
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    Qwen3ForCausalLM(their_config()).save_pretrained(folder)
    return Qwen3ForCausalLM.from_pretrained(folder)


def their_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {"<pad>": 0, "<eos>": 1, **{f"w{token_id}": token_id for token_id in range(2, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(names, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def words(ids: list[int]) -> str:
    return " ".join(f"w{token_id}" for token_id in ids)


def their_settings(variant: Variant, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"per_device_train_batch_size": BATCH, "gradient_checkpointing": False}
    if variant.shipped:
        del found["gradient_checkpointing"]
    else:
        found["bf16"] = variant.dtype == "bf16"
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return {"output_dir": f"{folder}/out", "use_cpu": True, **quiet, **found}


def in_turn(turns: Turns) -> Any:
    """A callback for trainers."""
    from transformers import TrainerCallback

    class InTurn(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns()

    return InTurn()


def their_ppo(turns: Turns, variant: Variant, folder: str) -> None:
    from datasets import Dataset
    from transformers import Qwen3ForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    config = their_config(num_labels=1)
    reward, value = Qwen3ForSequenceClassification(config), Qwen3ForSequenceClassification(config)
    policy = their_model(folder)
    trainer = PPOTrainer(
        args=PPOConfig(
            num_ppo_epochs=1,
            num_mini_batches=1,
            response_length=NEW_TOKENS,
            temperature=1.0,
            total_episodes=10**7,
            local_rollout_forward_batch_size=BATCH,
            num_sample_generations=0,
            **their_settings(variant, folder),
        ),
        processing_class=their_tokenizer(),
        model=policy,
        ref_model=their_model(folder),
        reward_model=reward.eval(),
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": random_ids(PAIRS, PROMPT_TOKENS)}),
        eval_dataset=Dataset.from_dict({"input_ids": random_ids(BATCH, PROMPT_TOKENS)}),
        callbacks=[in_turn(turns)],
    )
    turns()
    trainer.train()


def their_dpo(turns: Turns, variant: Variant, folder: str) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    said = iter(random_ids(2 * PAIRS, NEW_TOKENS - 1))  # and the end of the text
    rows = [
        {"prompt": words(ids) + " ", "chosen": words(next(said)), "rejected": words(next(said))}
        for ids in random_ids(PAIRS, PROMPT_TOKENS)
    ]
    if variant.precomputed:
        DPOTrainer._precompute_ref_logps = turns.clocked("reference", DPOTrainer._precompute_ref_logps)
    trainer = DPOTrainer(
        model=their_model(folder),
        ref_model=None if variant.precomputed else their_model(folder).requires_grad_(False),
        args=DPOConfig(
            max_steps=10**6,
            precompute_ref_log_probs=variant.precomputed,
            **their_settings(variant, folder),
        ),
        processing_class=their_tokenizer(),
        train_dataset=Dataset.from_list(rows),
        callbacks=[in_turn(turns)],
    )
    turns.ahead = turns.parts.pop("reference", 0.0) * BATCH / PAIRS
    turns()
    trainer.train()


def their_grpo(turns: Turns, variant: Variant, folder: str) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        model=their_model(folder),
        reward_funcs=lambda completion_ids, **_: even(completion_ids),
        args=GRPOConfig(
            max_steps=10**6,
            num_generations=SAMPLES,
            max_completion_length=NEW_TOKENS,
            beta=BETA,
            generation_kwargs={"min_new_tokens": NEW_TOKENS},
            **their_settings(variant, folder),
        ),
        processing_class=their_tokenizer(),
        train_dataset=Dataset.from_list([{"prompt": words(ids)} for ids in random_ids(PAIRS, PROMPT_TOKENS)]),
        callbacks=[in_turn(turns)],
    )
    turns()
    trainer.train()


def work(variant: Variant) -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # what trainers print is not for the parent
    turns = Turns(out)
    with contextlib.suppress(SystemExit), tempfile.TemporaryDirectory() as folder:
        if variant.who == "fledge":
            {"PPO": our_ppo, "DPO": our_dpo, "GRPO": our_grpo}[variant.task](turns)
        else:
            theirs = {"PPO": their_ppo, "DPO": their_dpo, "GRPO": their_grpo}
            theirs[variant.task](turns, variant, folder)


# The parent.


class Worker:
    """The parent's side of one variant."""

    def __init__(self, variant: Variant, options: argparse.Namespace) -> None:
        python = {"fledge": sys.executable, "TRL": options.trl18 if variant.task == "PPO" else options.trl}
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
        if variant.preload:
            environment["LD_PRELOAD"] = options.preload
        self.variant = variant
        self.process = subprocess.Popen(
            [python[variant.who], __file__, "--threads", str(options.threads), "--worker",
             json.dumps(asdict(variant))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.DEVNULL,
            env=environment,
            text=True,
        )  # fmt: skip
        self.ready = bool(self.process.stdout and self.process.stdout.readline())
        self.rounds: list[dict[str, Any]] = []

    def measure(self, steps: int) -> None:
        assert self.process.stdin and self.process.stdout
        print(steps, file=self.process.stdin, flush=True)
        self.rounds.append(json.loads(self.process.stdout.readline()))

    @property
    def seconds(self) -> list[float]:
        return [one["seconds"] for one in self.rounds]

    def parts(self) -> str:
        """Where the time goes, where that is known."""
        found = [one["parts"] for one in self.rounds]
        middle = {name: statistics.median(parts[name] for parts in found) for name in found[0]}
        if middle:
            middle["update"] = statistics.median(self.seconds) - sum(middle.values())
        return ", ".join(f"{name} {value:.2f}" for name, value in middle.items())


def show(workers: list[Worker], threads: int) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"12M parameters, {PROMPT_TOKENS} + {NEW_TOKENS} tokens, {threads} threads"
    heads = ("variant", "s/step", "range", "tokens/s", "fledge is faster by", "of these seconds")
    table = Table(*heads, title=title, title_justify="left")
    for worker in workers:
        task = worker.variant.task
        middle = statistics.median(worker.seconds)
        ours = next((w for w in workers if w.variant.task == task and w.variant.who == "fledge"), None)
        ratio = ""
        if ours is not None and ours is not worker:  # of each round: a slow one slows both
            found = [a / b for a, b in zip(worker.seconds, ours.seconds, strict=True)]
            ratio = f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"
        speed = ROWS[task] * (PROMPT_TOKENS + NEW_TOKENS) / middle
        spread = f"{min(worker.seconds):.2f}-{max(worker.seconds):.2f}"
        table.add_row(worker.variant.words(), f"{middle:.2f}", spread, f"{speed:,.0f}", ratio, worker.parts())
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trl", default="", help="a Python that has TRL 1.16")
    parser.add_argument("--trl18", default="", help="a Python that has TRL 1.8")
    parser.add_argument("--preload", default="", help="path of an allocator's shared library, for TRL")
    parser.add_argument("--only", default="", help="variants whose words contain one of these, by ;")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="steps of a variant in each round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--verbose", action="store_true", help="show what the variants print")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        work(Variant(**json.loads(options.worker)))
        return
    workers = []
    for variant in variants(bool(options.preload)):  # one after the other: what warms up does not compete
        known = variant.who == "fledge" or (options.trl18 if variant.task == "PPO" else options.trl)
        if not known or not any(word in variant.words() for word in options.only.split(";")):
            continue
        worker = Worker(variant, options)
        print(f"{variant.words()}: {'ready' if worker.ready else 'failed'}", file=sys.stderr)
        workers += [worker] if worker.ready else []
    for _ in range(options.rounds):
        for worker in workers:
            worker.measure(options.steps)
    for worker in workers:
        assert worker.process.stdin
        worker.process.stdin.close()
        worker.process.wait()
    show(workers, options.threads)


if __name__ == "__main__":
    main()
