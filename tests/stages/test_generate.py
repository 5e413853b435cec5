"""`fledge generate`: the text and nothing else on stdout, from any kind of prompt."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fledge.cli import main
from fledge.model.checkpoint import save_model
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import train_bpe

from ..models import save_chain_model

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("generate") / "model"
    save_chain_model(directory, train_bpe(["aa"], 265), "Ok, yes:é🙂!", context=64)
    return directory


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("generate") / "model"
    tokenizer = train_bpe(["aa"], 265)
    network = CausalLM(ModelConfig("qwen3", tokenizer.vocab_size, 16, 16, 1, 2, 1, 8, 64))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(0))
    directory.mkdir()
    save_model(directory, network, tokenizer, {"stage": "pretrain"}, [tokenizer.eos_id])
    return directory


def run(model: Path, *flags: str) -> int:
    return main(["generate", "--model", str(model), *flags])


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


@pytest.mark.parametrize("tty", [False, True])
def test_only_the_text_is_on_stdout(
    model: Path, tty: bool, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tty:
        terminal(monkeypatch)
    assert run(model, "--prompt", "Well?\n", "--temperature", "0") == 0
    printed = capsys.readouterr()
    assert printed.out == "Ok, yes:é🙂!\n"
    assert "tokens/s" in printed.err and "1 at their end" in printed.err


def test_a_prompt_becomes_a_users_turn(model: Path, capsys: Capture) -> None:
    # Without --chat the model sees a question mark last, and ends.
    assert run(model, "--prompt", "Well?", "--temperature", "0") == 0
    assert capsys.readouterr().out == "\n"
    assert run(model, "--prompt", "Well?", "--temperature", "0", "--chat") == 0
    assert capsys.readouterr().out == "Ok, yes:é🙂!\n"


def test_prompts_from_stdin_and_file(
    model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"a file\r\n\r\n")  # its last line break is the editor's, the other one is the prompt's
    stdin(monkeypatch, b"from a pipe\n\n")
    flags = ["--prompt", "-", "x", "--prompt-file", str(file)]
    assert run(model, *flags, "--temperature", "0") == 0
    printed = capsys.readouterr()
    assert printed.out == "Ok, yes:é🙂!\n\nOk, yes:é🙂!\n"
    assert "--- 1 of 3: from a pipe" in printed.err and "--- 3 of 3: a file" in printed.err


@pytest.mark.parametrize("tty", [False, True])
def test_stop_strings_and_length(
    model: Path, tty: bool, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tty:
        terminal(monkeypatch)
    assert run(model, "--prompt", "\n", "--stop", "s:", ":é", "--temperature", "0") == 0
    assert capsys.readouterr().out == "Ok, ye\n"
    assert run(model, "--prompt", "\n", "--max-tokens", "3", "--temperature", "0") == 0
    printed = capsys.readouterr()
    assert printed.out == "Ok,\n"
    assert "3 tokens" in printed.err and "1 at --max-tokens" in printed.err


def test_seeds(random_model: Path, capsys: Capture) -> None:
    def made(*flags: str) -> str:
        assert run(random_model, "--prompt", "a", "--max-tokens", "8", *flags) == 0
        return capsys.readouterr().out

    assert made() == made("--seed", "0") != made("--seed", "1")
    assert made("--top-k", "1") == made("--temperature", "0") == made("--top-p", "0.001", "--seed", "3")
    assert len(made("--n", "3")) > len(made())
    assert made("--n", "3").startswith(made())


def test_n_texts_are_different(random_model: Path, capsys: Capture) -> None:
    assert run(random_model, "--prompt", "a", "--n", "6", "--max-tokens", "4", "--stop", "\n") == 0
    assert "--- 6 of 6: a" in capsys.readouterr().err


def test_an_empty_prompt_starts_a_document(random_model: Path, capsys: Capture) -> None:
    assert run(random_model, "--prompt", "", "--max-tokens", "3", "--temperature", "0") == 0
    assert "3 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("tty", [False, True])
def test_a_model_does_not_control_the_terminal(
    tty: bool, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_chain_model(tmp_path / "model", train_bpe(["aa"], 265), "a\x1b]0;p\x07\x9b2J\tb")
    if tty:
        terminal(monkeypatch)
    for more in ([], ["--n", "2"]):  # streamed on a terminal, and not
        assert run(tmp_path / "model", "--prompt", "\x1b[2J\n", "--temperature", "0", *more) == 0
        printed = capsys.readouterr()
        clean = "a]0;p2J\tb\n" if tty else "a\x1b]0;p\x07\x9b2J\tb\n"
        assert printed.out == clean * (2 if more else 1)
        assert "\x1b" not in printed.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to continue"),
        (["--prompt", "-", "-"], "given twice"),
        (["--prompt-file", "FOLDER/nothing.txt"], "nothing.txt: cannot read the prompt"),
        (["--prompt-file", "FOLDER"], "cannot read the prompt: Is a directory"),
        (["--prompt-file", "FOLDER/latin.txt"], "latin.txt:2: not valid UTF-8"),
        (["--prompt", "caf\udce9"], "surrogate"),
        (["--prompt", "a" * 65], "text 1 of 1 has 65 tokens, the model's context holds 64"),
        (["--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--prompt", "a", "--top-p", "0"], "top_p"),
        (["--prompt", "a", "--top-k", "0"], "top_k"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens"),
        (["--prompt", "a", "--stop", ""], "stop string is empty"),
        (["--prompt", "a", "--n", "0"], "--n 0"),
        (["--prompt", "a", "--min-p", "2"], "min_p 2.0"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty 0.0"),
        (["--prompt", "a", "--presence-penalty", "nan"], "presence_penalty nan"),
        (["--prompt", "a", "--min-tokens", "300"], "min_tokens 300"),
        (["--prompt", "a", "--show-logprobs", "-1"], "top_logprobs -1"),
        (["--prompt", "a", "--logit-bias", "7"], "'7' is not of the form TOKEN=BIAS"),
        (["--prompt", "a", "--logit-bias", "900=1"], "token 900 is unknown"),
        (["--prompt", "a", "--logit-bias", "5=-101"], "logit_bias of token 5 is -101.0"),
        (["--prompt", "a", "--stop-ids", "900"], "stop_ids: token 900 is unknown"),
        (["--prompt", "a", "--ban", ""], "banned word is empty"),
        (["--prompt", "a", "--batch-size", "0"], "batch_size 0"),
        (["--prompt", "a", "--out", "FOLDER/o.jsonl"], "--out, --strict and --overwrite go with --batch"),
        (["--prompt", "a", "--batch", "FOLDER/b.jsonl"], "--batch has its own prompts"),
        (["--batch", "FOLDER/b.jsonl"], "--batch needs --out"),
        (["--batch", "FOLDER/no.jsonl", "--out", "FOLDER/o.jsonl"], "no.jsonl: no such file"),
        (["--batch", "FOLDER/b.jsonl", "--out", "FOLDER/b.jsonl"], "is the file of --batch itself"),
        (["--batch", "FOLDER/b.jsonl", "--out", "FOLDER/o.jsonl", "--strict"], "b.jsonl:2: not valid JSON"),
        (["--prompt", "a", "--model", "FOLDER/none"], "no such model directory"),
        (["--prompt", "a", "--device", "abacus"], "abacus"),
        (["--prompt", "a", "--weights", "fp8"], "fp8"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "latin.txt").write_bytes("fine\ncafé\n".encode("latin-1"))
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    flags = [flag.replace("FOLDER", str(tmp_path)) for flag in flags]
    model_flags = [] if "--model" in flags else ["--model", str(model)]
    assert main(["generate", *model_flags, *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fledge generate: error: ") and message in printed.err
    assert printed.err.count("\n") == 1


def test_biases_and_bans(model: Path, capsys: Capture) -> None:
    def made(*flags: str) -> str:
        assert run(model, "--prompt", "\n", "--temperature", "0", "--max-tokens", "6", *flags) == 0
        return capsys.readouterr().out.removesuffix("\n")

    assert made() == "Ok, ye"
    assert made("--ban", "k") == "O"
    assert made("--ban", "y", "Ok,") == "Ok"
    assert made("--logit-bias", ",=-100") == "Ok"
    assert made("--logit-bias", "Z=100") == "ZZZZZZ"
    assert made("--logit-bias", "O=5", "--repetition-penalty", "0.01") == "OOOOOO"
    both = ["--logit-bias", "k=100", ",=100"]  # the comma has the lower id, so it wins a tie
    assert made(*both) == ",,,,,,"
    assert made(*both, "--presence-penalty", "1") == ",k,,,,"
    assert made(*both, "--frequency-penalty", "1") == ",k,k,k"
    assert made("--stop-ids", "11") == "Ok"  # the comma of GPT-2's alphabet
    assert made("--echo") == "\nOk, ye"
    for weights in ("bf16", "fp16"):
        assert made("--weights", weights) == "Ok, ye"
    assert len(made("--ban", "k", "--min-tokens", "4")) >= 4


def test_probabilities_are_shown(model: Path, random_model: Path, capsys: Capture) -> None:
    assert (
        run(model, "--prompt", "\n", "--temperature", "0", "--max-tokens", "2", "--show-logprobs", "2") == 0
    )
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert printed.out == "Ok\n" and len(lines) == 3
    assert lines[0].split()[:5] == ["100.00%", '"O"', "|", "100.00%", '"O"'] and "<|im_end|>" in lines[0]
    flags = ["--max-tokens", "3", "--stop", "never"]
    assert run(random_model, "--prompt", "abc", "--echo", "--show-logprobs", "0", *flags) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("abc") and len(printed.err.splitlines()) == 2 + 3 + 1
    assert all("|" not in line for line in printed.err.splitlines()[:5])


def write_rows(path: Path, rows: int) -> list[str]:
    prompts = [f"{i} " * (i % 5 + 1) for i in range(rows)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return prompts


def test_a_batch(model: Path, random_model: Path, tmp_path: Path, capsys: Capture) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"prompt": "\\n", "id": "a"}\n{"messages": [{"role": "user", "content": "?"}]}\n{"x": 1}\n'
    )
    flags = ["--batch", str(source), "--out", str(out)]
    assert run(model, *flags, "--temperature", "0") == 0
    printed = capsys.readouterr()
    assert printed.out == "" and "3 rows, 1 with an error" in printed.err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["completions"][0]["text"] for row in rows[:2]] == ["Ok, yes:é🙂!"] * 2
    assert rows[0]["id"] == "a" and "prompt" in rows[2]["error"]
    assert run(model, *flags) == 2 and "exists already" in capsys.readouterr().err
    # A row gets what the same prompts get as flags.
    prompts = write_rows(source, 5)
    assert run(random_model, *flags, "--overwrite", "--temperature", "1", "--max-tokens", "5") == 0
    capsys.readouterr()
    assert run(random_model, "--prompt", *prompts, "--temperature", "1", "--max-tokens", "5") == 0
    texts = [json.loads(line)["completions"][0]["text"] for line in out.read_text().splitlines()]
    assert capsys.readouterr().out == "".join(text + "\n" for text in texts)


def test_a_batch_goes_on_without_strict(random_model: Path, tmp_path: Path, capsys: Capture) -> None:
    """Nor does it matter how the model's directory is written."""
    rows = [{"prompt": prompt} for prompt in ("a", "b", "c", "d", "x " * 3000)]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--batch", str(source), "--out", str(out), "--max-tokens", "2", "--batch-size", "1"]
    assert main(["generate", "--model", f"{random_model}/", *flags, "--strict"]) == 2
    assert "in.jsonl:5: " in capsys.readouterr().err
    assert main(["generate", "--model", str(random_model), *flags]) == 0
    assert " of them from before, 1 with an error; " in capsys.readouterr().err


@pytest.mark.slow
def test_a_batch_goes_on_after_kill_9(random_model: Path, tmp_path: Path) -> None:
    source, whole, out = tmp_path / "in.jsonl", tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    write_rows(source, 120)
    flags = ["generate", "--model", str(random_model), "--batch", str(source), "--max-tokens", "50"]
    flags += ["--batch-size", "2"]
    assert main([*flags, "--out", str(whole)]) == 0
    journal, kept = tmp_path / "out.jsonl.partial", 0
    for _ in range(2):
        code = "import sys, torch; torch.set_num_threads(1); from fledge.cli import main; sys.exit(main())"
        process = subprocess.Popen([sys.executable, "-c", code, *flags, "--out", str(out)])
        while process.poll() is None and (
            not journal.exists() or journal.read_bytes().count(b"\n") < kept + 15
        ):
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not out.exists()
        kept = journal.read_bytes().count(b"\n")
    assert main([*flags, "--seed", "1", "--out", str(out)]) == 2  # another job
    assert main([*flags, "--out", str(out)]) == 0
    assert out.read_bytes() == whole.read_bytes() and not journal.exists()


def test_invalid_stdin(model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"one\ntwo\n\xff\n")
    assert run(model, "--prompt=-") == 2
    assert "stdin:3: not valid UTF-8" in capsys.readouterr().err


def test_a_tokenizer_without_a_template(model: Path, tmp_path: Path, capsys: Capture) -> None:
    tokenizer = train_bpe(["aa"], 265)
    save_chain_model(tmp_path / "model", tokenizer, "Ok!")
    tokenizer.chat_template = None
    tokenizer.save(tmp_path / "model")
    assert run(tmp_path / "model", "--prompt", "\n", "--temperature", "0") == 0
    assert capsys.readouterr().out == "Ok!\n"
    assert run(tmp_path / "model", "--prompt", "\n", "--chat") == 2
    assert "no chat template" in capsys.readouterr().err


def test_a_constraint_holds(random_model: Path, tmp_path: Path, capsys: Capture) -> None:
    schema, lark = tmp_path / "a.json", tmp_path / "a.lark"
    schema.write_text('{"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 4}')
    lark.write_text('start: "<" /[a-c]{3}/ ">"')
    for flags, pattern in [
        (["--choices", "yes", "no"], "yes|no"),
        (["--regex", "[0-9]{3}"], "[0-9]{3}"),
        (["--json-schema", str(schema)], r"\[[12](, [12]){1,3}\]"),
        (["--json-schema", schema.read_text()], r"\[[12](, [12]){1,3}\]"),
        (["--grammar", str(lark)], "<[a-c]{3}>"),
    ]:
        assert run(random_model, "--prompt", "aa", "a", "--max-tokens", "40", *flags) == 0
        printed = capsys.readouterr()
        lines = printed.out.splitlines()
        assert len(lines) == 2 and all(re.fullmatch(pattern, line) for line in lines)
        assert re.search(r"tokens/s, [\d,]+ \u00b5s a mask; ended: 2 at their end", printed.err)
    assert run(random_model, "--prompt", "aa", "--regex", "[0-9]{30}", "--max-tokens", "4") == 0
    printed = capsys.readouterr()
    assert re.fullmatch("[0-9]{4}\n", printed.out) and "1 at --max-tokens" in printed.err


def test_the_probabilities_of_choices(random_model: Path, capsys: Capture) -> None:
    flags = ["--prompt", "aa", "b", "--choices", "a", "aa", "b", "--show-probabilities"]
    assert run(random_model, *flags) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "%" in line or "tokenisation" in line]
    assert [line.split(":")[0] for line in lines if "---" in line] == [
        f"--- {i} of 2, by every tokenisation" for i in (1, 2)
    ]
    shares = [float(line.split("%")[0]) for line in lines if "%" in line]
    assert len(shares) == 6 and sum(shares[:3]) == pytest.approx(100, abs=0.05)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--regex", "a["], "regex: "),
        (["--regex", "a", "--choices", "b"], "choices and regex"),
        (["--json-schema", "nowhere.json"], "nowhere.json: no such file"),
        (["--json-schema", '{"type": "x"}'], "json_schema: Invalid type"),
        (["--grammar", "nowhere.lark"], "cannot read the grammar"),
        (["--show-probabilities"], "goes with --choices"),
    ],
)
def test_constraints_that_mean_nothing(
    random_model: Path, flags: list[str], message: str, capsys: Capture
) -> None:
    assert run(random_model, "--prompt", "a", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_constraints_of_a_batch(random_model: Path, tmp_path: Path, capsys: Capture) -> None:
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows: list[dict[str, object]] = [
        {"prompt": "a"},
        {"prompt": "b", "choices": ["x", "yy"]},
        {"prompt": "a", "regex": "[0-9]{2}"},
        {"prompt": "a", "regex": "["},
        {"prompt": "a", "json_schema": {"const": 5}},
        {"prompt": "a" * 62, "choices": ["xxxx"]},
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--batch", str(prompts), "--out", str(out), "--choices", "yes", "no", "--max-tokens", "9"]
    assert run(random_model, *flags, "--show-probabilities") == 0
    assert "a mask" in capsys.readouterr().err
    made = [json.loads(line) for line in out.read_text().splitlines()]
    texts = [row["completions"][0]["text"] if "completions" in row else "" for row in made]
    assert texts[0] in ("yes", "no") and texts[1] in ("x", "yy") and re.fullmatch("[0-9]{2}", texts[2])
    assert "regex: " in made[3]["error"] and texts[4] == "5" and "before the choices" in made[5]["error"]
    for row, choices in ((made[0], {"yes", "no"}), (made[1], {"x", "yy"})):
        assert row["probabilities"].keys() == choices and row["probabilities_method"] == "exact"
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    assert "probabilities" not in made[2]
