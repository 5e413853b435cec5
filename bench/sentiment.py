"""Accuracy of choices as a classifier on sentences with a sentiment (SST-2's two labels).

    python bench/sentiment.py PATH_TO_SST2_FOLDER --model DIR [--shots 0 4] [--split dev test] [--limit 500]

A model may be taught first, and is then asked in its chat format (`--chat`, no examples in the prompt):

    python bench/sentiment.py FOLDER --conversations sentiment.jsonl
    fledge sft --model BASE --data sentiment.jsonl --out runs/sentiment
    python bench/sentiment.py FOLDER --model runs/sentiment/model --chat --shots 0

The folder has stsa.binary.{train,dev,test}.txt: a line is a label (0 or 1), a space and a sentence. The
answer is the choice whose probability is the highest; with --calibrate, by how much it is higher than
behind a prompt without a sentence (Zhao et al. 2021, "Calibrate before use"). Examples come from train.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fledge.device import pick_device
from fledge.engine.choices import MAX_TOKENISATION_TOKENS, choice_logps
from fledge.engine.text import LocalChat, encode_prompt, load_engine
from fledge.errors import UserError
from fledge.types import Message

LABELS = ("negative", "positive")


def read(path: Path) -> list[tuple[int, str]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        label, _, sentence = line.partition(" ")
        if label not in ("0", "1") or not sentence:
            raise UserError(f"{path}:{number}: not a label (0 or 1), a space and a sentence")
        rows.append((int(label), sentence.strip()))
    return rows


def shown(sentence: str, label: str = "") -> str:
    return f"Review: {sentence}\nSentiment:{label and f' {label}'}"


def asked(sentence: str) -> list[Message]:
    return [{"role": "user", "content": f"Is this review positive or negative? {sentence}"}]


def write_conversations(rows: list[tuple[int, str]], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for label, sentence in rows:
            answer = {"role": "assistant", "content": LABELS[label]}
            file.write(json.dumps({"messages": [*asked(sentence), answer]}) + "\n")


def few_shot(train: list[tuple[int, str]], shots: int, seed: int) -> str:
    """As many of each label, in random order."""
    chosen = random.Random(seed)
    some = [row for label in (0, 1) for row in chosen.sample([r for r in train if r[0] == label], shots // 2)]
    chosen.shuffle(some)
    return "".join(shown(sentence, LABELS[label]) + "\n\n" for label, sentence in some)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 4], help="examples in the prompt (even)")
    parser.add_argument("--split", nargs="+", default=["dev", "test"])
    parser.add_argument("--limit", type=int, help="the first so many sentences only")
    parser.add_argument(
        "--tokenisation-tokens", type=int, default=MAX_TOKENISATION_TOKENS,
        help="sum over all tokenisations up to so many tokens; 0: only the tokenizer's own",
    )  # fmt: skip
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--chat", action="store_true", help="ask in the model's chat format")
    parser.add_argument("--conversations", type=Path, help="write the training sentences as chats, and end")
    options = parser.parse_args()
    if options.folder and options.conversations:
        write_conversations(read(options.folder / "stsa.binary.train.txt"), options.conversations)
        return
    if options.folder is None or options.model is None:  # `make bench` has neither
        print("sentiment.py needs a folder with the sentences and --model; nothing is measured")
        return
    engine, tokenizer = load_engine(options.model, device=pick_device(options.device))
    train = read(options.folder / "stsa.binary.train.txt")
    # A line break ends an answer here: a model that never saw a chat has no other end for a word.
    choices = list(LABELS) if options.chat else [f" {label}\n" for label in LABELS]
    chat = LocalChat(engine, tokenizer) if options.chat else None
    most = options.tokenisation_tokens
    table = Table("split", "shots", "accuracy", "positive said", "sentences", "a second", "method")
    for split in options.split:
        rows = read(options.folder / f"stsa.binary.{split}.txt")[: options.limit]
        for shots in options.shots:
            before = few_shot(train, shots, options.seed)

            def prompt(sentence: str, before: str = before) -> list[int]:
                if chat is not None:
                    return chat.prompt(asked(before + sentence))
                return encode_prompt(tokenizer, before + shown(sentence))

            prompts = [prompt(sentence) for _, sentence in rows]
            started = time.perf_counter()
            scores = choice_logps(engine, tokenizer, prompts, choices, end=options.chat, max_tokens=most)
            bias = 0.0
            if options.calibrate:
                empty = prompt("N/A")
                (prior,) = choice_logps(
                    engine, tokenizer, [empty], choices, end=options.chat, max_tokens=most
                )
                bias = prior.logps[1] - prior.logps[0]
            seconds = time.perf_counter() - started
            said = [int(score.logps[1] - score.logps[0] > bias) for score in scores]
            right = sum(one == label for one, (label, _) in zip(said, rows, strict=True))
            table.add_row(
                split, str(shots), f"{right / len(rows):.1%}", f"{sum(said) / len(rows):.1%}",
                f"{len(rows):,}", f"{len(rows) / seconds:,.0f}", scores[0].method,
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
