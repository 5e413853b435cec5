"""Preferences: every form says the same, and a broken line is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fledge.data.comparisons import (
    best_rows,
    compare,
    encode_completion,
    shuffled_labels,
    split_by_prompt,
    without_prompt,
)
from fledge.data.preferences import (
    Judgement,
    Ranking,
    judgement_row,
    ordered_pairs,
    pair_rows,
    parse_preference,
    ranking_row,
    read_judgements,
    read_rankings,
)
from fledge.errors import UserError
from fledge.tokenizer.bpe import Tokenizer, train_bpe
from fledge.tokenizer.chat import encode_chat


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["one two three"], 265)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


ASKED = [user("2 + 2?")]
TRANSCRIPT = "\n\nHuman: 2 + 2?\n\nAssistant: "


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
        {"prompt": ASKED, "chosen": [said("4")], "rejected": [said("5")]},
        {"prompt": ASKED, "chosen": "4", "rejected": "5"},
        {"chosen": [*ASKED, said("4")], "rejected": [*ASKED, said("5")]},
        {"prompt": "2 + 2?", "chosen": [*ASKED, said("4")], "rejected": [*ASKED, said("5")]},
        {"chosen": f"{TRANSCRIPT}4", "rejected": f"{TRANSCRIPT}5"},
        {"prompt": TRANSCRIPT, "chosen": "4", "rejected": "5"},
        {"chosen": "2 + 2? 4", "rejected": "2 + 2? 5"},
        {"prompt": "2 + 2?", "completions": ["4", "5"], "ranks": [1, 2]},
        {"prompt": ASKED, "completions": [[said("4")], "5"], "ranks": [1, 2]},
    ],
    ids=json.dumps,
)
def test_all_forms_of_a_pair_are_the_same(row: dict[str, Any]) -> None:
    ranking = parse_preference(row, "a:1")
    assert ranking == Ranking(ASKED, [[said("4")], [said("5")]], [1, 2], where="a:1")


def test_conversations_are_split_where_the_assistant_begins_to_differ() -> None:
    begin = f"{TRANSCRIPT}4\n\nHuman: Sure?\n\nAssistant: "
    ranking = parse_preference({"chosen": f"{begin}Yes.", "rejected": f"{begin}No."}, "a:1")
    assert isinstance(ranking, Ranking)
    assert ranking.prompt == [user("2 + 2?"), said("4"), user("Sure?")]
    assert ranking.completions == [[said("Yes.")], [said("No.")]]


def test_a_user_who_answers_differently_is_part_of_the_completion() -> None:
    """What differs begins with the assistant's turn before it, so that both completions begin with one."""
    chosen = [*ASKED, said("4"), user("Thanks"), said("Bye")]
    rejected = [*ASKED, said("4"), user("Wrong"), said("No")]
    ranking = parse_preference({"chosen": chosen, "rejected": rejected}, "a:1")
    assert isinstance(ranking, Ranking)
    assert ranking.prompt == ASKED
    assert ranking.completions == [chosen[1:], rejected[1:]]


@pytest.mark.parametrize("prompt", ["2 + 2?", ASKED, None])
def test_judgements(prompt: Any, tmp_path: Path) -> None:
    completion = [*ASKED, said("4")] if prompt is None else "4"
    path = write(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": completion, "label": True}])
    assert read_judgements(path) == [Judgement(ASKED, [said("4")], True, where=f"{path}:1")]


def test_what_is_written_is_read_back() -> None:
    row = {
        "prompt": ASKED, "completions": [[said("4")], [said("5")], [said("four")]], "ranks": [1, 3, 1],
        "margin": 0.5, "kinds": ["right", "wrong", "right"], "labeler": "ann", "order": [2, 0, 1],
        "simulated": True,
    }  # fmt: skip
    ranking = parse_preference(row, "a:1")
    assert isinstance(ranking, Ranking)
    assert ranking_row(ranking) == row
    assert parse_preference(json.loads(json.dumps(ranking_row(ranking))), "a:1") == ranking
    pairs = [parse_preference(pair, "a:1") for pair in pair_rows(ranking)]
    assert [(p.completions, p.kinds, p.margin, p.labeler, p.simulated) for p in pairs] == [
        ([[said("4")], [said("5")]], ["right", "wrong"], 0.5, "ann", True),
        ([[said("four")], [said("5")]], ["right", "wrong"], 0.5, "ann", True),
    ]
    judgement = parse_preference({"prompt": ASKED, "completion": [said("5")], "label": False}, "a:1")
    assert isinstance(judgement, Judgement)
    assert judgement_row(judgement) == {"prompt": ASKED, "completion": [said("5")], "label": False}


def test_ties_give_no_pairs() -> None:
    assert ordered_pairs([1, 2, 2, 4]) == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    assert ordered_pairs([3, 1]) == [(1, 0)]
    assert ordered_pairs([2, 2, 2]) == []


def test_packed_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'\n{"prompt": "a", "chosen": "b", "rejected": "c"}\n'))
    assert read_rankings(path)[0].where == f"{path}:2"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "no preference: it takes chosen and rejected, or"),
        ({"chosen": "a b", "rejected": "c d"}, "prompt is missing, and the completions do not begin alike"),
        (
            {"prompt": "a", "chosen": 4, "rejected": "b"},
            "chosen is 4; it must be a text or a list of messages",
        ),
        (
            {"prompt": "a", "chosen": [{}], "rejected": "b"},
            "chosen[0] is not a message with role and content",
        ),
        (
            {"prompt": "a", "chosen": [user("b")], "rejected": "c"},
            "a completion must begin and end with a turn",
        ),
        (
            {"prompt": [said("a")], "chosen": "b", "rejected": "c"},
            "the prompt must end with a turn of somebody",
        ),
        (
            {"prompt": "a", "completions": ["b"], "ranks": [1]},
            "completions has 1; a ranking takes two or more",
        ),
        (
            {"prompt": "a", "completions": ["b", "c"], "ranks": [1]},
            "ranks is [1]; it must be 2 whole numbers",
        ),
        ({"prompt": "a", "completions": ["b", "c"], "ranks": [1, True]}, "ranks is [1, True]; it must be 2"),
        ({"prompt": "a", "completions": ["b", "c"]}, "ranks is missing; it must be a list"),
        ({"prompt": "a", "ranks": [1, 2]}, "completions is missing; it must be a list"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "order": [0, 2]}, "order is [0, 2]; it must hold"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "kinds": ["d"]},
            "kinds is ['d']; it must be 2 words",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "d"},
            "margin is 'd'; it must be a number",
        ),
        ({"prompt": "a", "completion": "b", "label": 1}, "label is 1; it must be true or false"),
        ({"prompt": "a", "completion": "b", "label": True}, "another kind of preference"),
    ],
)
def test_a_mistake_is_named_with_its_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}, row])
    with pytest.raises(UserError) as error:
        read_rankings(path)
    assert str(error.value).startswith(f"{path}:2: {message}")


def test_a_file_without_preferences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no preferences"):
        read_rankings(write(tmp_path / "a.jsonl", []))


# As ids.


def test_a_completion_ends_with_its_end_of_turn(tokenizer: Tokenizer) -> None:
    """And only the tokens of the completion are marked, not the assistant's earlier turns."""
    prompt = [user("a"), said("b"), user("c")]
    chat = encode_completion(tokenizer, prompt, [said("d e")])
    asked = encode_chat(tokenizer, prompt, None, add_generation_prompt=True).ids
    assert chat.ids[: len(asked)] == asked
    assert chat.mask == [False] * len(asked) + [True] * (len(chat.ids) - len(asked))
    assert tokenizer.decode(chat.ids[len(asked) :]) == "d e<|im_end|>"


def test_a_template_without_marks_is_refused(tokenizer: Tokenizer) -> None:
    plain = tokenizer.with_chat("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="does not mark what the assistant writes"):
        encode_completion(plain, [user("a")], [said("b")])


def ranking(prompt: str, completions: list[str], ranks: list[int], **more: Any) -> Ranking:
    turns: Any = [[said(text)] for text in completions]
    return Ranking([user(prompt)], turns, ranks, **more)


def test_rankings_of_one_prompt_are_one_comparison(tokenizer: Tokenizer) -> None:
    """Two labelers saw three answers between them: each answer is encoded once."""
    found = compare(
        [
            ranking("a", ["x", "y"], [1, 2], labeler="ann"),
            ranking("b", ["x", "y"], [1, 1]),
            ranking("a", ["z", "x"], [1, 3], labeler="bob", kinds=["right", "wrong"]),
        ],
        tokenizer,
        100,
    )
    (prompt,) = found.prompts
    assert [turns[0]["content"] for turns in prompt.completions] == ["x", "y", "z"]
    assert [(p.better, p.worse, p.ranks_apart, p.labeler, p.kinds) for p in prompt.pairs] == [
        (0, 1, 1, "ann", None),
        (2, 0, 2, "bob", ("right", "wrong")),
    ]
    assert (found.undecided, found.overlong, found.same, found.num_pairs) == (1, 0, 0, 2)


def test_what_is_left_out_is_counted(tokenizer: Tokenizer) -> None:
    found = compare(
        [
            ranking("a", ["x", "y" * 50, "z"], [1, 2, 3]),  # the pair without the long one stays
            ranking("b", ["x", "y" * 50], [1, 2]),
            ranking("c", ["x", "x", "z"], [1, 2, 3]),
        ],
        tokenizer,
        40,
    )
    assert [len(prompt.pairs) for prompt in found.prompts] == [1, 2]
    assert (found.overlong, found.undecided, found.same) == (2, 1, 1)


def test_prompts_are_never_in_both_parts(tokenizer: Tokenizer) -> None:
    rankings = [ranking(f"{i % 50}", [f"x{i}", "y"], [1, 2]) for i in range(200)]
    prompts = compare(rankings, tokenizer, 100).prompts
    train, held = split_by_prompt(prompts, 0.3)
    assert len(prompts) == 50 == len(train) + len(held)
    assert 5 < len(held) < 25
    again = split_by_prompt(prompts[::-1], 0.3)[1]
    assert {prompt.key for prompt in again} == {prompt.key for prompt in held}
    assert len(split_by_prompt(prompts[:2], 1e-9)[1]) == 1
    assert len(split_by_prompt(prompts[:2], 1 - 1e-9)[0]) == 1
    assert split_by_prompt(prompts, 0.0)[1] == []


def test_shuffled_labels_turn_half_of_the_prompts(tokenizer: Tokenizer) -> None:
    """Of each kind of pair, and with all pairs of a prompt at once."""
    rankings = [ranking(f"{i}", ["x", "y"], [1, 2], kinds=["a", "bc"[i % 2]]) for i in range(40)]
    prompts = compare([*rankings, ranking("k", ["x", "y", "z"], [1, 2, 3])], tokenizer, 100).prompts
    shuffled = shuffled_labels(prompts, 0)
    turned = [old.pairs != new.pairs for old, new in zip(prompts, shuffled, strict=True)]
    assert (sum(turned[0:40:2]), sum(turned[1:40:2])) == (10, 10)
    assert {pair.better for pair in shuffled[-1].pairs} in ({0, 1}, {1, 2})
    other = shuffled_labels(prompts, 1)
    assert [p.pairs for p in other] != [p.pairs for p in shuffled]
    assert [p.ids for p in shuffled] == [p.ids for p in prompts]


def test_without_prompts_the_same_answers_read_the_same(tokenizer: Tokenizer) -> None:
    prompts = compare([ranking(p, ["x", "y"], [1, 2]) for p in ("a", "b")], tokenizer, 100).prompts
    first, second = without_prompt(prompts, tokenizer)
    assert first.ids == second.ids != prompts[0].ids
    assert first.pairs == prompts[0].pairs


def test_the_best_completions_are_those_that_never_lost(tokenizer: Tokenizer) -> None:
    group = [
        ranking("a", ["x", "y", "z"], [1, 1, 2]),
        ranking("b", ["x", "y"], [1, 2]),
        ranking("b", ["y", "x"], [1, 2]),
    ]
    rows = best_rows(compare(group, tokenizer, 100).prompts)
    assert [tokenizer.decode(ids)[-11:] for ids in rows] == ["x<|im_end|>", "y<|im_end|>"] * 2
