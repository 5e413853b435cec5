"""`fledge label`: people write, rate, rank and correct outputs in a browser: data to train on."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fledge.config import check_at_least
from fledge.device import pick_device
from fledge.engine.remote import RemoteChat, connect
from fledge.engine.sampling import validate
from fledge.engine.text import LocalChat, load_engine
from fledge.errors import UserError
from fledge.feedback import agreement, exports, imports
from fledge.feedback.forms import ProjectSettings
from fledge.feedback.opening import changed_settings, existing, find_project
from fledge.feedback.prepare import Preparation, Row, Writer, add_prompts, judge_rule, read_prompts
from fledge.feedback.records import Project
from fledge.feedback.serving import serve
from fledge.feedback.simulate import RULES, Rule, find_rule, prefill_by_rule, simulate
from fledge.feedback.store import Store, add_project, list_projects, waiting_items
from fledge.files import read_text
from fledge.types import SamplingParams
from fledge.web.listening import listen

STORE = "runs/label/labels.db"
LEFT_OUT_SHOWN = 5
EDITABLE = {
    "instructions": "--instructions", "labelers_per_item": "--labelers-per-task", "prefill": "--prefill",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """Open a labelling page in the browser; outputs are prepared in the background, and labelling can begin
    when the first are there. The same command again goes on where it was."""

    prompts: Path | None = None
    """JSONL file of {"prompt": ...} or {"messages": [...]} rows, perhaps with "completions" or "gold"."""
    model: tuple[str, ...] = ()
    """Model directories that write the outputs; with --endpoint, also names of models there."""
    endpoint: str | None = None
    """Address of an OpenAI-compatible server, as http://localhost:8000/v1."""
    endpoint_key: str | None = None
    """Name of the environment variable that holds the endpoint's key."""
    store: str = STORE
    """Where answers are kept: a file, or postgresql://USER:PASSWORD@HOST/NAME."""
    project: str = ""
    """Name of the project in the store; by default the store's only one, or the prompt file's name."""
    task: tuple[str, ...] = ()
    """What people do: ranking (the default), rating, pairwise, demonstration, correction; several may be."""
    outputs: int | None = None
    """Outputs for each prompt, 4 by default, at most 9; models share them equally."""
    pairs: int | None = None
    """Pairs asked about for each prompt in pairwise tasks; all by default."""
    labelers_per_task: int | None = None
    """People who are asked the same, 1 by default; two or more show how far they agree."""
    instructions: Path | None = None
    """Markdown file with what labelers read; admins can edit it in the browser."""
    questions: tuple[str, ...] = ()
    """Keys of the yes/no questions of ratings; InstructGPT's eleven by default."""
    labelers: tuple[str, ...] = ()
    """Names of people to invite: a personal link is printed for each new one."""
    admin: str = "admin"
    """Name of the admin whose link is printed; the link of the last start ends."""
    prefill: str | None = None
    """Rule (shorter, longer, gold-first) or model that fills in answers first; shown as a judge's."""
    simulate: str | None = None
    """Rule that labels instead of people; its rows are marked simulated. Then nothing is served."""
    simulated_labelers: int = 3
    """How many of them."""
    noise: float = 0.1
    """How often a simulated labeler errs."""
    temperature: float = 1.0
    """Randomness of the outputs; at 0 a model gives one output only."""
    top_p: float | None = None
    """Sample among the fewest tokens whose probabilities sum to this."""
    max_tokens: int = 512
    """Longest output in tokens."""
    seed: int = 0
    """Of the outputs, and of the order in which each labeler sees them."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets others in, which wants a proxy with TLS before it."""
    port: int = 8000
    """Port to listen on."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:INDEX or mps."""


def main(config: Config) -> None:
    """Prepare, and serve until Ctrl-C; or simulate, and end."""
    check_at_least(config, 0, "seed", "port")
    check_at_least(config, 1, "simulated_labelers", "max_tokens")
    rule = find_rule(config.simulate) if config.simulate else None
    params = SamplingParams(
        temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens, seed=config.seed
    )
    validate(params)
    listening = None if rule else listen(config.host, config.port)
    store = Store(config.store)
    try:
        # All that can be wrong is looked at first: a mistake leaves no project behind.
        found, settings, rows = asked_project(store, config)
        writers = [Writer(name, chat_of(name, config)) for name in config.model]
        judge = judge_of(config, writers)
        waiting = len(waiting_items(store, found.id)) if found else 0
        if settings.kinds != ("demonstration",):
            waiting += sum(outputs is None for _, outputs, _, _ in rows)
        if waiting and not writers:
            raise UserError(f"{waiting} prompts have no outputs; name models that write them with --model")
        project = found or Project(add_project(store, settings), settings)
        add_prompts(store, project.id, rows)
        prefill = partial(prefill_by_rule, store, project.id, judge, config.prefill or "") if judge else None
        preparation = Preparation(store, project.id, writers, params, print_progress, prefill)
        if listening is None:
            assert rule is not None and config.simulate is not None
            preparation.run()
            number = (config.simulated_labelers, config.noise, config.seed)
            print_simulated(store, project, config.simulate, number)
        else:
            serve(store, project.id, preparation, listening, config.admin, config.labelers)
    finally:
        store.close()
        if listening is not None:
            listening.close()


def asked_project(store: Store, config: Config) -> tuple[Project | None, ProjectSettings, list[Row]]:
    """The project that the flags name, if it is there; its settings; and the rows of --prompts."""
    known = list_projects(store)
    name = config.project or (config.prompts.stem if config.prompts else "")
    if not name and len(known) == 1:
        name = known[0].settings.name
    if not name:
        names = ", ".join(project.settings.name for project in known)
        raise UserError(f"--project is needed: {names}" if names else "--prompts FILE is needed")
    found = next((project for project in known if project.settings.name == name), None)
    if found is None and config.prompts is None:
        raise UserError(f"the store has no project {name!r}; begin it with --prompts FILE.jsonl")
    settings = settings_of(config, name, found.settings if found else None)
    rows = [] if config.prompts is None else list(read_prompts(config.prompts, settings.kinds))
    if config.prompts is not None and not rows:
        raise UserError(f"{config.prompts}: no prompts in it")
    for field, flag in EDITABLE.items() if found else ():
        # The same command again must not undo what an admin has edited since.
        if found and getattr(settings, field) != getattr(found.settings, field):
            print(
                f"{flag} is left as project {name} has it; admins change it in the browser", file=sys.stderr
            )
    return found, settings, rows


def settings_of(config: Config, name: str, old: ProjectSettings | None) -> ProjectSettings:
    """The settings that the flags ask for, over those of a project that is there. UserError where a flag
    would change what cannot change any more."""
    given = {
        "kinds": config.task or None, "models": config.model or None, "outputs_per_prompt": config.outputs,
        "pairs_per_prompt": config.pairs, "labelers_per_item": config.labelers_per_task,
        "questions": config.questions or None,
        "instructions": read_text(config.instructions) if config.instructions else None,
        "prefill": True if config.prefill else None,
    }  # fmt: skip
    given = {key: value for key, value in given.items() if value is not None}
    return changed_settings(name, old, given, config.seed)


def chat_of(name: str, config: Config) -> LocalChat | RemoteChat:
    """A model directory, or a model at the endpoint."""
    if Path(name).is_dir() or config.endpoint is None:
        engine, tokenizer = load_engine(Path(name), device=pick_device(config.device))
        return LocalChat(engine, tokenizer)
    return connect(config.endpoint, name, config.endpoint_key, os.environ)


def judge_of(config: Config, writers: Sequence[Writer]) -> Rule | None:
    """What fills in answers before people, if --prefill is given."""
    name = config.prefill
    if name is None or name in RULES:
        return RULES[name] if name else None
    if config.endpoint is None and not Path(name).is_dir():
        raise UserError(f"--prefill {name}: no rule ({', '.join(RULES)}) and no model directory")
    known = {writer.name: writer.chat for writer in writers}
    return judge_rule(known.get(name) or chat_of(name, config))


def print_progress(done: int, total: int) -> None:
    """Tell how far the outputs are, on stderr."""
    print(f"outputs: {done:,} of {total:,} prompts", file=sys.stderr, flush=True)


def print_simulated(store: Store, project: Project, rule: str, how: tuple[int, float, int]) -> None:
    """Label by a rule, and say how far its labelers agree."""
    labelers, noise, seed = how
    new = simulate(store, project.id, find_rule(rule), rule, labelers=labelers, noise=noise, seed=seed)
    print(f"{new:,} simulated answers by {labelers} labelers, rule {rule}, noise {noise:g}")
    for row in agreement.figures(store, project.id).agreement:
        alpha = "-" if row.alpha is None else f"{row.alpha:.2f}"
        mark = " (simulated)" if row.simulated else ""
        print(f"{row.kind} {row.question}: agreement {row.percent:.0%}, alpha {alpha}{mark}")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the labels of a project as JSON Lines that `fledge sft`, `fledge reward`, TRL and others read."""

    store: str = STORE
    """Where the answers are: a file, or postgresql://USER:PASSWORD@HOST/NAME."""
    project: str = ""
    """Name of the project; may be left out where the store has one only."""
    form: str
    """messages, prompt-completion, preference, unpaired, ranked, or answers (everything)."""
    out: Path
    """New file; with --shares a new folder."""
    shares: tuple[str, ...] = ()
    """Split by prompt, as in train=0.9 test=0.1: a file for each share."""
    seed: int = 0
    """Of the split."""
    overwrite: bool = False
    """Replace what --out holds."""


def export(config: Export) -> None:
    """Write, and say how many rows."""
    shares = parse_shares(config.shares)
    store = Store(existing(config.store))
    try:
        written = exports.write_export(
            store, find_project(store, config.project).id, config.form, config.out, shares=shares,
            seed=config.seed, overwrite=config.overwrite,
        )  # fmt: skip
    finally:
        store.close()
    for name, rows in written.items():
        print(f"{rows:,} rows: {config.out / name if shares else config.out}")


def parse_shares(texts: Sequence[str]) -> dict[str, float] | None:
    """{"train": 0.9} from train=0.9; UserError for anything else."""
    shares = {}
    for text in texts:
        name, _, share = text.partition("=")
        if not name.isidentifier() or name in shares:
            raise UserError(f"--shares {text}: write NAME=SHARE with different names, as train=0.9 test=0.1")
        try:
            shares[name] = float(share)
        except ValueError:
            raise UserError(f"--shares {text}: {share!r} is no number") from None
    return shares or None


@dataclass(frozen=True, kw_only=True)
class Import:
    """Read labels that others made into a project: as they are, with their labelers."""

    data: Path
    """File to read: .jsonl or .json."""
    format: str = "trl"
    """trl, hh-rlhf, summarize-from-feedback, ultrafeedback or label-studio."""
    buckets: tuple[str, ...] = ()
    """Names of a Label Studio ranker's buckets from best to worst; one bucket is one place."""
    store: str = STORE
    """Where answers are kept: a file, or postgresql://USER:PASSWORD@HOST/NAME."""
    project: str = ""
    """Name of the project, begun if it is new; by default the file's name."""
    skip_unfit: bool = False
    """Leave out rows that fit no task (more than 9 outputs, only good or bad) and say which."""


def import_(config: Import) -> None:
    """Read all of a file, or nothing."""
    rows = list(imports.read_labels(config.data, config.format, config.buckets))
    if not rows:
        raise UserError(f"{config.data}: no labels in it")
    name = config.project or config.data.stem
    store = Store(config.store)
    try:
        found = next((known for known in list_projects(store) if known.settings.name == name), None)
        # Only what the file holds: a kind more would ask people for it.
        kinds = tuple(sorted({imports.kind_of(row) for row in rows}, reverse=True))
        project_id = found.id if found else add_project(store, ProjectSettings(name, kinds))
        done = imports.import_labels(
            store, project_id, iter(rows), str(config.data), skip_unfit=config.skip_unfit
        )
    finally:
        store.close()
    print(f"{done.answers:,} labels: project {name}")
    for reason in done.left_out[:LEFT_OUT_SHOWN]:
        print(f"left out: {reason}", file=sys.stderr)
    if len(done.left_out) > LEFT_OUT_SHOWN:
        print(f"left out: {len(done.left_out):,} rows in all", file=sys.stderr)


ACTIONS = {"export": (Export, export), "import": (Import, import_)}
