"""How fast text becomes ids: `tokenizers`, tiktoken, and `tokenise` from file to shards, in MB/s of text.

    python bench/tokenise.py [SOURCE] [--mb 8] [--vocab-size 32768] [--rounds 5]

SOURCE is whatever `--data` of `fledge pretrain` takes; by default the source code of the standard library.
Rounds are interleaved, so that a slow minute of the machine slows them all; medians are shown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fledge.data.shards import tokenise
from fledge.data.sources import Source, parse_source, read_documents
from fledge.tokenizer.bpe import SPLIT_PATTERN, Tokenizer, train_bpe
from fledge.tokenizer.fast import fast_encoder

BASELINE = "tokenizers: encode"


def take(documents: Iterator[str], limit: int) -> list[str]:
    taken: list[str] = []
    size = 0
    for text in documents:
        if size >= limit:
            break
        taken.append(text)
        size += len(text.encode())
    return taken


def tiktoken_of(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """tiktoken as its users call it, on the same merges (their ids are in the order of the merges)."""
    import tiktoken

    plain = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i)]
    ranks = {tokenizer.token_bytes(i): i for i in plain}
    encoding = tiktoken.Encoding("bench", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    return encoding.encode_ordinary


def contenders(
    tokenizer: Tokenizer, texts: list[str], source: Source, workers: int
) -> dict[str, Callable[[], object]]:
    fast = fast_encoder(tokenizer)
    assert fast is not None
    encode_ordinary = tiktoken_of(tokenizer)

    def to_shards() -> None:
        with tempfile.TemporaryDirectory() as folder:
            tokenise(source, tokenizer, Path(folder), workers=workers)

    return {
        BASELINE: lambda: [tokenizer.encode(text) for text in texts],
        "tokenizers: encode_batch_fast": lambda: tokenizer.encode_batch(texts),
        "tiktoken: encode_ordinary": lambda: [encode_ordinary(text) for text in texts],
        "fledge: fast_encoder": lambda: fast(texts),
        "fledge: tokenise, file to shards": to_shards,
    }


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def show(source: str, limit: int, vocab_size: int, rounds: int, cores: int) -> None:
    """One table, on so many cores."""
    texts = take(read_documents(parse_source(source)), limit)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    tokenizer = train_bpe(texts, vocab_size)
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        seconds = measure(contenders(tokenizer, texts, Source("texts", str(path), None), cores), rounds)
    table = Table("", "MB/s", "times encode", title=f"{cores} core{'s' * (cores > 1)}", title_justify="left")
    for name, value in seconds.items():
        table.add_row(name, f"{megabytes / value:.2f}", f"{seconds[BASELINE] / value:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"{megabytes:.1f} MB in {len(texts):,} documents, {tokens:,} tokens, vocabulary "
        f"{tokenizer.vocab_size:,}, medians of {rounds} rounds: {source}",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", nargs="?", default=str(Path(json.__file__).parent.parent / "*.py"))
    parser.add_argument("--mb", type=float, default=6.0, help="how much of it, in MB of text")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, help="1, and 2 where there are two")
    options = parser.parse_args()
    usable = sorted(os.sched_getaffinity(0))
    if options.cores is None:
        # A process for each: the threads of `tokenizers` stay on the cores they were started on.
        for cores in (1, 2)[: len(usable)]:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--cores", str(cores)], check=True)
        return
    os.sched_setaffinity(0, usable[: options.cores])
    show(options.source, int(options.mb * 1e6), options.vocab_size, options.rounds, options.cores)


if __name__ == "__main__":
    main()
