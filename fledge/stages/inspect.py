"""`fledge inspect`: what a model expects at every place of a text, and what each of its layers does."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fledge.config import check_at_least
from fledge.device import DeviceName, pick_device
from fledge.engine.engine import Engine
from fledge.engine.text import LocalChat, encode_prompt, load_engine
from fledge.errors import UserError
from fledge.evals.token_histogram import described, described_lens, expectations, logit_lens
from fledge.files import read_text, write_json
from fledge.model.transformer import CausalLM
from fledge.report.inspect import write_inspect_page
from fledge.tokenizer.bpe import Tokenizer
from fledge.tokenizer.chat import encode_chat
from fledge.types import Message, SamplingParams

# A pipe has no width; a line as wide as this holds five candidates of usual length.
PIPE_COLUMNS = 160


@dataclass(frozen=True, kw_only=True)
class Config:
    """Show what a model expects at every place of a text: the most probable tokens, and how sure it is."""

    model: Path
    """Model directory."""
    prompt: str | None = None
    """The text; `-` reads it from stdin."""
    prompt_file: Path | None = None
    """UTF-8 file whose whole content is the text (without its last line break)."""
    chat: bool = False
    """Read the text as a user's turn, up to where the assistant begins to answer."""
    answer: str | None = None
    """With --chat: the assistant's turn, read behind the user's."""
    document: bool = False
    """Read the text as the beginning of a document, so that its first token has a probability too."""
    top: int = 5
    """Most probable tokens shown in each place."""
    continue_: int = 0
    """So many tokens that the model itself goes on with (greedy), looked at as well."""
    lens: bool = False
    """With --html or --json: what each layer would predict, by the logit lens."""
    html: Path | None = None
    """File for a page to look at in a browser."""
    json: Path | None = None
    """File for all figures as JSON."""
    overwrite: bool = False
    """Replace the files of --html and --json."""
    device: DeviceName = "auto"
    """Where to run."""


def main(config: Config) -> None:
    """Print a table and write the page and the figures."""
    _check(config)
    text = _text(config)
    engine, tokenizer = load_engine(config.model, device=pick_device(config.device))
    ids = _ids(config, text, engine, tokenizer)
    read = len(ids)
    if config.continue_:
        ids = [*ids, *_continuation(config, ids, engine, tokenizer)]
    found = {
        "model": str(config.model),
        "chat": config.chat,
        **described(tokenizer, ids, expectations(engine, ids, config.top), read),
    }
    if config.lens:
        found["lens"] = described_lens(tokenizer, logit_lens(_transformer(engine), ids, config.top))
    for path in (config.html, config.json):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if config.json is not None:
        write_json(config.json, found)
    if config.html is not None:
        write_inspect_page(config.html, found)
    _print(found)


def _check(config: Config) -> None:
    check_at_least(config, 1, "top")
    if config.continue_ < 0:
        raise UserError(f"--continue {config.continue_}: must be at least 0")
    if config.answer is not None and not config.chat:
        raise UserError("--answer goes with --chat: it is the assistant's turn")
    if config.answer is not None and config.continue_:
        raise UserError("--answer and --continue: give one of them; an answer ends with its turn")
    if config.document and config.chat:
        raise UserError("--document and --chat: give one of them; a chat begins as its template says")
    if config.lens and config.html is None and config.json is None:
        raise UserError("--lens goes with --html FILE or --json FILE: a terminal has no room for the grid")
    if config.html is not None and config.html == config.json:
        raise UserError(f"--html and --json name the same file {config.html}; choose another for one")
    for path in (config.html, config.json):
        if path is not None and path.exists() and not config.overwrite:
            raise UserError(f"{path}: exists already; choose another name or pass --overwrite")


def _text(config: Config) -> str:
    if (config.prompt is None) == (config.prompt_file is None):
        raise UserError("give one text: --prompt TEXT, --prompt - (stdin) or --prompt-file FILE")
    if config.prompt_file is not None:
        return read_text(config.prompt_file).replace("\r\n", "\n").removesuffix("\n")
    assert config.prompt is not None
    if config.prompt != "-":
        return config.prompt
    try:
        return sys.stdin.buffer.read().decode().replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: not valid UTF-8 (byte {error.start}); send UTF-8") from None


def _ids(config: Config, text: str, engine: Engine, tokenizer: Tokenizer) -> list[int]:
    """The text as the model reads it: as `fledge generate` and `fledge chat` would give it."""
    if config.document:
        return [tokenizer.start_id, *tokenizer.encode(text)]
    if not config.chat:
        return encode_prompt(tokenizer, text)
    chat = LocalChat(engine, tokenizer)
    question = Message(role="user", content=text)
    if config.answer is None:
        return chat.prompt([question])
    return encode_chat(tokenizer, [question, Message(role="assistant", content=config.answer)]).ids


def _continuation(config: Config, ids: list[int], engine: Engine, tokenizer: Tokenizer) -> list[int]:
    """The greedy tokens that follow, with the one that ends them."""
    params = SamplingParams(temperature=0.0, max_tokens=config.continue_)
    if config.chat:
        params = LocalChat(engine, tokenizer).until_end_of_turn(params)
    made = engine.generate([ids], params)[0]
    return [*made.ids, *([made.stop_token.id] if made.stop_token is not None else [])]


def _transformer(engine: Engine) -> CausalLM:
    if not isinstance(engine.model, CausalLM):
        raise UserError("--lens has no meaning for an n-gram model: it has no layers; leave it out")
    return engine.model


def _print(found: dict[str, Any]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_COLUMNS)
    table = Table(pad_edge=False)
    for name in ("#", "token", "probability", "rank", "bits", "entropy"):
        table.add_column(name, justify="left" if name == "token" else "right", no_wrap=name != "token")
    table.add_column("most probable in its place")
    for token in found["tokens"]:
        shown = Text(_spaces(token["text"]), style="bold" if token["made"] else "")
        if token["logp"] is None:
            table.add_row(str(token["position"]), shown, "", "", "", "", "")
            continue
        figures = (_share(token["logp"]), f"{token['rank']:,}", f"{-token['logp'] / math.log(2):.2f}")
        cells = (str(token["position"]), shown, *figures, f"{token['entropy_bits']:.2f}")
        table.add_row(*cells, _candidates(token["top"], token["id"]))
    after = found["next"]
    table.add_row(
        "", Text("next", style="dim"), "", "", "", f"{after['entropy_bits']:.2f}", _candidates(after["top"])
    )
    console.print(table)
    known = [token for token in found["tokens"] if token["logp"] is not None]
    if known:
        bits = -sum(token["logp"] for token in known) / math.log(2) / len(known)
        first = sum(token["rank"] == 1 for token in known)
        console.print(
            f"{len(known):,} tokens, {bits:.3f} bits each on average; {first:,} were the most probable",
            highlight=False,
        )


def _candidates(top: list[dict[str, Any]], actual: int | None = None) -> Text:
    """`62.1% ␣the  3.0% ␣a`, the token that came in bold."""
    line = Text(overflow="fold")
    for number, candidate in enumerate(top):
        line.append(f"{'  ' if number else ''}{_share(candidate['logp'])} ", style="dim")
        line.append(_spaces(candidate["text"]), style="bold" if candidate["id"] == actual else "")
    return line


def _share(logp: float) -> str:
    share = math.exp(logp)
    return f"{share:.1%}" if share >= 0.001 else f"{share:.0e}"


def _spaces(text: str) -> str:
    return text.replace(" ", "\N{OPEN BOX}")
