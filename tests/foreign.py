"""Tokenizers as others publish them: the structure of real ones, with small vocabularies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fledge.tokenizer.bpe import BYTE_OF_CHAR
from fledge.tokenizer.fast import GPT2_PATTERN, LLAMA3_PATTERN
from fledge.tokenizer.files import BYTE_TOKENS

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 1984, isn't it?\n\n\n\n  \n \n\n" * 3,
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\r\n\t\t\n" * 3,
    "Der Weg führt über die Brücke; Быстрая лиса. 素早い狐 素早い犬 🦊🦊 שלום עולם\n" * 3,
]

Make = Callable[[Path], tuple[str, ...]]


def write(directory: Path, backend: tokenizers.Tokenizer, **config: Any) -> None:
    backend.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def trained(pattern: str, size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=list(BYTE_OF_CHAR), show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def llama3(directory: Path) -> tuple[str, ...]:
    """Split by a regular expression, whole words from the vocabulary first, BOS by the post-processor."""
    backend = trained(LLAMA3_PATTERN, 500)
    special = (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    )
    backend.add_special_tokens(list(special))
    bos = backend.token_to_id(special[0])
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{special[0]} $A",
                pair=f"{special[0]} $A {special[0]}:1 $B:1",
                special_tokens=[(special[0], bos)],
            ),
        ]
    )
    template = (
        "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    write(directory, backend, bos_token=special[0], eos_token=special[1], chat_template=template)
    return special


def gpt2(directory: Path) -> tuple[str, ...]:
    """GPT-2's two files alone."""
    backend = trained(GPT2_PATTERN, 450)
    data = json.loads(backend.to_str())["model"]
    vocab = {**data["vocab"], "<|endoftext|>": len(data["vocab"])}
    (directory / "vocab.json").write_text(json.dumps(vocab))
    lines = [" ".join(merge) for merge in data["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
    return ("<|endoftext|>",)


def sentencepiece_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The order of Llama 2's and Mistral's: control tokens, bytes, merged pieces, characters."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", True)
    backend.train_from_iterator(
        (" ".join(text.split()) for text in TEXTS[:2]),
        trainers.BpeTrainer(vocab_size=150, show_progress=False),
    )
    data = json.loads(backend.to_str())["model"]
    learned = sorted(data["vocab"], key=lambda piece: (len(piece) == 1, data["vocab"][piece]))
    pieces = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, *learned]
    merges = [(a, b) for a, b in data["merges"]]
    return {piece: i for i, piece in enumerate(pieces)}, merges


SP_DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
SP_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% endif %}{% endfor %}"
)


def sentencepiece(directory: Path, scheme: str) -> tuple[str, ...]:
    vocab, merges = sentencepiece_vocabulary()
    model = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    if scheme == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, False)
    backend.decoder = decoders.Sequence(SP_DECODER)
    special = ("<unk>", "<s>", "</s>")
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write(directory, backend, **roles, chat_template=SP_TEMPLATE)
    return special


def unigram(directory: Path) -> tuple[str, ...]:
    vocab, _ = sentencepiece_vocabulary()
    scores = [(piece, 0.0 if i < 259 else -2.0 - i / 100) for i, piece in enumerate(vocab)]
    backend = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", True)
    backend.decoder = decoders.Sequence(SP_DECODER)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    write(directory, backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return ("<unk>", "<s>", "</s>")


KINDS: dict[str, Make] = {
    "llama3": llama3,
    "gpt2": gpt2,
    "prepend": lambda directory: sentencepiece(directory, "prepend"),
    "always": lambda directory: sentencepiece(directory, "always"),
    "first": lambda directory: sentencepiece(directory, "first"),
    "unigram": unigram,
}
