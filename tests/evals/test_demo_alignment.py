"""The demo's alignment: what is held out, what a limit leaves, and KL divergences with known values."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch

from fledge.engine.engine import Engine
from fledge.evals import demo_alignment
from fledge.evals.demo_alignment import compare, d_prime, is_held_out, refused_of, sampled_kl
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.types import SamplingParams

NAMES = ("invented_answered", "test_wrongly_refused", "test_right")


def row(name: str, number: int, **more: Any) -> dict[str, Any]:
    gold = None if name == "invented" else "Gold."
    return {"set": f"eval_{name}", "question": f"{name} {number}?", "gold": gold, "answer": "A.", **more}


def test_about_an_eighth_of_the_names_is_held_out() -> None:
    held = sum(is_held_out(f"module.name{i}") for i in range(4000))
    assert abs(held / 4000 - 0.12) < 4 * (0.12 * 0.88 / 4000) ** 0.5


@pytest.mark.parametrize("limit", [1, 6, 40])
def test_a_limit_leaves_some_of_each_side_and_split(limit: int) -> None:
    rows = [{"split": split, "name": f"{split}{i}"} for split in ("sft", "invented") for i in range(200)]
    kept = demo_alignment._limited(rows, limit)
    for split in ("sft", "invented"):
        own = [row["name"] for row in kept if row["split"] == split]
        assert len(own) == limit and sum(map(is_held_out, own)) == -(-limit // 8)
    assert demo_alignment._limited(rows, None) == rows


def test_differences_are_paired_by_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by hand: of 4 invented names answered 3, then 1; of 4 test names right 2, then 3."""
    before = [row("invented", i, refused=i == 0) for i in range(4)]
    before += [row("test", i, f1=0.9 if i < 2 else 0.1, refused=i == 3) for i in range(4)]
    after = [row("invented", i, refused=i != 1) for i in range(4)]
    after += [row("test", i, f1=0.8 if i < 3 else 0.79, refused=False) for i in range(4)]
    files = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    for path, rows in zip(files, (before, list(reversed(after))), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    monkeypatch.setattr(demo_alignment, "_asked", lambda corpus, limit: [{"question": "Q"}])
    monkeypatch.setattr(
        demo_alignment, "sampled_kl", lambda *_: (demo_alignment.bootstrap([0.5], 0), [["a", "b"]])
    )
    monkeypatch.setattr(demo_alignment, "_worth", lambda *_: ([[1.0, 3.0]], [[0.0, 1.0]]))
    found = compare(files, (tmp_path, tmp_path), tmp_path, tmp_path, 0)
    shares = {name: (found[name]["before"], found[name]["after"]) for name in NAMES}
    assert shares == {
        "invented_answered": (0.75, 0.25),
        "test_wrongly_refused": (0.25, 0.0),
        "test_right": (0.5, 0.75),
    }
    means = [found[name]["difference"]["mean"] for name in NAMES]
    assert means == [-0.5, -0.25, 0.25]
    assert (found["kl"]["mean"], found["aligned"]["reward"]["mean"], found["aligned"]["gold"]["mean"]) == (
        0.5, 2.0, 0.5,
    )  # fmt: skip


def test_separation_is_that_of_the_normal_distribution() -> None:
    """97.725% against 50% is two standard deviations; a threshold that is moved leaves it as it is."""
    share = np.array([NormalDist().cdf(x) for x in (2.0, 1.0, 0.5)])
    other = np.array([NormalDist().cdf(x) for x in (0.0, -1.0, -1.5)])
    assert d_prime(share, other) == pytest.approx([2.0, 2.0, 2.0])
    counts = np.array([[5, 1, 2, 3]])  # refused before: 2 + 3, after: 1 + 3, of 11
    assert [refused_of(counts, side)[0] for side in (0, 1)] == [5.5 / 12, 4.5 / 12]


def test_separations_are_paired_and_those_of_the_shares() -> None:
    """A model that refuses the same names is as far apart; one that refuses none of either is not at all."""
    rows = [("eval_invented", i, i < 80) for i in range(100)] + [("eval_test", i, i < 20) for i in range(100)]
    before = {(name, f"{i}"): {"refused": refused} for name, i, refused in rows}
    same = demo_alignment._separations(before, before, 0)
    z = NormalDist().inv_cdf
    assert same["before"] == same["after"] == pytest.approx(z(80.5 / 101) - z(20.5 / 101))
    assert same["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 200}
    none = demo_alignment._separations(before, {key: {"refused": False} for key in before}, 0)
    assert none["after"] == 0.0 and none["difference"]["high"] < 0


class Chat:
    """What `_chat` gives, of a model whose next token never depends on what it read; token 3 ends."""

    def __init__(self, logits: torch.Tensor) -> None:
        config = ModelConfig("qwen3", 4, 8, 16, 1, 1, 1, 8, 64, tie_word_embeddings=False)
        model = CausalLM(config)
        model.init_weights(torch.Generator().manual_seed(0))
        with torch.no_grad():  # nothing is added to the embedding, which is 1 everywhere
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            model.model.embed_tokens.weight.fill_(1.0)
            model.lm_head.weight.copy_(logits[:, None].expand(4, 8) / 8)
        self.engine = Engine(model, [3], batch_size=256)
        self.tokenizer = self

    def prompt(self, messages: object) -> list[int]:
        return [0]

    def until_end_of_turn(self, params: SamplingParams) -> SamplingParams:
        return params

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return " ".join(map(str, ids))


def test_the_divergence_is_that_of_a_chain_that_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are independent, so the KL of an answer is that of a token times the expected tokens, its end
    included: (1 - (1 - p)^T) / p for an end of probability p and at most T tokens."""
    logits = {"policy": torch.tensor([0.3, -0.4, 0.8, 0.1]), "reference": torch.tensor([0.0, 0.5, 0.0, 0.4])}
    monkeypatch.setattr(demo_alignment, "_chat", lambda model, exact: Chat(logits[model.name]))
    p, q = (each.log_softmax(0).double() for each in logits.values())
    end, most = p[3].exp().item(), demo_alignment.MAX_TOKENS
    exact = (p.exp() * (p - q)).sum().item() * (1 - (1 - end) ** most) / end
    found, texts = sampled_kl(Path("reference"), Path("policy"), ["Q?"] * 400, seed=0)
    assert len(texts) == 400 and {len(own) for own in texts} == {demo_alignment.KL_ANSWERS}
    assert found.low - 0.5 * (found.high - found.low) < exact < found.high + 0.5 * (found.high - found.low)
    assert found.high - found.low < 0.3 * exact
    same, _ = sampled_kl(Path("policy"), Path("policy"), ["Q?"] * 5, seed=0)
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)
