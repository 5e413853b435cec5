"""Tokenizer files of Hugging Face's layout, ours and others', and changes to what is in them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from fledge.errors import UserError
from fledge.files import read_json

# What a tokenizer is saved as.
FILES = ("tokenizer.json", "tokenizer_config.json")
# GPT-2's own form: the vocabulary and the merges, under Hugging Face's names and OpenAI's.
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
GPT2_END = "<|endoftext|>"

BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


def read_backend(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The backend and `tokenizer_config.json` of a directory.

    Kinds: byte-level BPE, and what SentencePiece makes (BPE or Unigram with tokens for single bytes). Raises
    UserError that names the file when one is missing, broken, or of another kind.
    """
    path, config_path = (directory / name for name in FILES)
    gpt2 = next((p for p in GPT2_FILES if all((directory / name).exists() for name in p)), None)
    if path.exists() or gpt2 is None:
        backend = _read_tokenizer_json(path)
        config = read_config(config_path)
        _add_config_tokens(backend, config, config_path)
    else:
        config = read_config(config_path) if config_path.exists() else {}
        backend, config = _read_gpt2(directory, gpt2, config)
    _mark_named_tokens(backend, config)
    return backend, config


def read_config(path: Path) -> dict[str, Any]:
    """A `tokenizer_config.json`, with the roles of the older `special_tokens_map.json` beside it."""
    config = _read_object(path)
    if isinstance(templates := config.get("chat_template"), list):  # several, by name
        config["chat_template"] = next(
            (t.get("template") for t in templates if isinstance(t, dict) and t.get("name") == "default"), None
        )
    older = path.parent / "special_tokens_map.json"
    if older.exists():
        roles = _read_object(older)
        config = {key: value for key, value in roles.items() if key.endswith("_token")} | config
    return config


def named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The tokens with a role (`eos_token`, `bos_token`, ...) by its name, as templates see them."""
    tokens = {}
    for name, value in config.items():
        if name.endswith("_token") and value:
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                tokens[name] = content
    return tokens


def read_text(path: Path) -> str:
    """A file of a tokenizer; UserError that names it if it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = ""
        if path.name == FILES[0] and (path.parent / "tokenizer.model").exists():
            hint = "; tokenizer.model is not read: save it with transformers' AutoTokenizer first"
        raise UserError(f"{path}: no such file; a tokenizer is {' and '.join(FILES)}{hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 (byte {error.start}); get the file again") from None


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; get the file again")
    return value


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    text = read_text(path)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(f"{path}: not a tokenizer ({error}); get the file again") from None
    data = json.loads(backend.to_str())
    kind = data["model"]["type"]
    if kind == "BPE" and any(step["type"] == "ByteLevel" for step in steps(data["pre_tokenizer"])):
        return backend
    if kind not in ("BPE", "Unigram") or not data["model"].get("byte_fallback"):
        raise UserError(
            f"{path}: neither a byte-level BPE tokenizer nor one with tokens for single bytes "
            "(byte_fallback); fledge reads no other kind"
        )
    lacking = next((token for token in BYTE_TOKENS if backend.token_to_id(token) is None), None)
    if lacking is not None:
        raise UserError(f"{path}: has no token {lacking}, so some texts would be lost; it cannot be used")
    return backend


def steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normaliser or pre-tokenizer in a tokenizer.json, whether it is a sequence or not."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = part.get("normalizers") or part.get("pretokenizers") or []
    return [step for nested in inner for step in steps(nested)]


def _read_gpt2(
    directory: Path, names: tuple[str, str], config: dict[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    kind = str(config.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if kind != "GPT2Tokenizer":
        raise UserError(f"{directory / FILES[0]}: no such file, which a {kind} here needs; get it too")
    vocab, merges = (directory / name for name in names)
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(f"{vocab}, {merges.name}: not GPT-2's files ({error}); get them again") from None
    backend = tokenizers.Tokenizer(model)
    prefix = bool(config.get("add_prefix_space"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), GPT2_END)
    config = {**roles, **config, "tokenizer_class": "PreTrainedTokenizerFast"}
    added = directory / "added_tokens.json"
    if added.exists():
        config.setdefault("added_tokens_decoder", {str(i): token for token, i in _read_object(added).items()})
    _add_config_tokens(backend, config, added)
    bos = named_tokens(config)["bos_token"]
    if config.pop("add_bos_token", False) and (bos_id := backend.token_to_id(bos)) is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, bos_id)]
        )
    return backend, config


def _add_config_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], path: Path) -> None:
    """Add what `added_tokens_decoder` lists and the tokenizer lacks, at the ids that it says."""
    listed = config.get("added_tokens_decoder") or {}
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in sorted(_added_tokens(listed, path), key=lambda item: item[0]):
        if token.content not in known:
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise UserError(f"{path}: {token.content!r} should have the id {token_id}, which is another's")


def _added_tokens(listed: Any, path: Path) -> Iterator[tuple[int, AddedToken]]:
    try:
        for token_id, token in listed.items():
            flags = {"content": token, "special": True} if isinstance(token, str) else dict(token)
            flags.pop("__type", None)
            yield int(token_id), AddedToken(**flags)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: added_tokens_decoder is not a list of tokens by id ({error})") from None


def _mark_named_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Make words of the vocabulary that have a role special, as transformers does; ids stay as they are."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    words = sorted(set(named_tokens(config).values()) - known)
    backend.add_special_tokens([word for word in words if backend.token_to_id(word) is not None])


def without_added_tokens(data: dict[str, Any], added: Collection[str]) -> dict[str, Any]:
    """The tokenizer.json of the same encoder without added tokens, not even as words of its vocabulary."""
    model = dict(data["model"])
    if model["type"] == "Unigram":
        # Ids are places in the list. A piece with a space in it is out of reach: texts have U+2581 for it.
        model["vocab"] = [
            [f" {i}" if piece in added else piece, score] for i, (piece, score) in enumerate(model["vocab"])
        ]
    elif not model["vocab"].keys().isdisjoint(added):
        # Some tokenizers keep their special tokens in the vocabulary as well. A merge, or the token for
        # what is unknown, could then still lead to one.
        model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in added}
        model["merges"] = [m for m in model["merges"] if not {*m, "".join(m)} & set(added)]
        if model.get("unk_token") in added:
            model["unk_token"] = None
    return {**data, "model": model, "added_tokens": [], "post_processor": None}


def without_prefix(data: dict[str, Any]) -> dict[str, Any] | None:
    """The tokenizer.json of the same encoder without a space of its own in front; None if it has none."""
    data = json.loads(json.dumps(data))
    normalizers = steps(data["normalizer"])
    kept = [step for step in normalizers if step["type"] != "Prepend"]
    changed = len(kept) != len(normalizers)
    if changed:
        data["normalizer"] = {"type": "Sequence", "normalizers": kept}
    for step in steps(data["pre_tokenizer"]):
        if step["type"] == "Metaspace" and step["prepend_scheme"] != "never":
            step["prepend_scheme"], changed = "never", True
        elif step["type"] == "ByteLevel" and step["add_prefix_space"]:
            step["add_prefix_space"], changed = False, True
    return data if changed else None
