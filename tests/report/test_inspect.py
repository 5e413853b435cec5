"""The page of `fledge inspect`: its figures, hostile tokens, and nothing loaded or run."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from fledge.report.inspect import share, write_inspect_page

EVIL = "<script>alert(1)</script>"


def found(**more: Any) -> dict[str, Any]:
    top = [{"id": 7, "text": " the", "logp": math.log(0.5)}, {"id": 8, "text": EVIL, "logp": math.log(0.25)}]
    spread = {"entropy_bits": 2.0, "top": top}
    tokens = [
        {"position": 0, "id": 1, "text": EVIL, "special": False, "made": False, "logp": None, "rank": None,
         "entropy_bits": None, "top": []},
        {"position": 1, "id": 7, "text": " the", "special": False, "made": False, "logp": math.log(0.5),
         "rank": 1, **spread},
        {"position": 2, "id": 9, "text": '"x\' onmouseover=', "special": False, "made": True,
         "logp": math.log(2**-20), "rank": 1234, **spread},
    ]  # fmt: skip
    return {"model": f"runs/{EVIL}", "chat": False, "tokens": tokens, "next": spread, **more}


def page(directory: Path, **more: Any) -> str:
    write_inspect_page(directory / "page.html", found(**more))
    return (directory / "page.html").read_text(encoding="utf-8")


def test_the_page_shows_the_figures(tmp_path: Path) -> None:
    made = page(tmp_path)
    assert "<strong>10.50 bits</strong>" in made, "the mean of 1 and 20"
    assert "rank 1,234" in made
    tints = [float(tint) for tint in re.findall(r'class="token[^"]*" style="--t:([\d.]+)"', made)]
    assert tints == [0.0, 0.1, 1.0]
    assert made.count('class="token made"') == 1
    assert 'id="lens"' not in made
    bars = re.findall(r'class="bar( came)?"', made)
    # The first token has none; the second came as expected; the third's own bar stands below its two.
    assert bars == [" came", "", "", "", " came", "", ""]


def test_hostile_tokens_are_text_and_nothing_is_loaded(tmp_path: Path) -> None:
    made = page(tmp_path)
    assert "<script" not in made
    assert "&lt;script&gt;alert(1)" in made
    assert not re.search(r"<[^>]* onmouseover=", made)
    assert not re.search(r'(src|href)="(?!data:|#)', made)
    assert "default-src 'none'" in made
    assert "url(" not in made


def test_every_token_and_cell_can_be_reached_by_keyboard(tmp_path: Path) -> None:
    cell = {"logp": math.log(0.5), "rank": 2, "entropy_bits": 1.0, "top": found()["next"]["top"]}
    lens = [{"layer": n, "after": [cell, cell, {**cell, "logp": None, "rank": None}]} for n in range(3)]
    made = page(tmp_path, lens=lens)
    assert made.count('tabindex="0"') == 3 + 9
    assert made.count('class="cell right"') == 3, "the first place of each layer"
    rows = re.findall(r'<th scope="row">(\w+)</th>', made)
    assert rows == ["follows", "2", "1", "embedding", "read"]
    assert "<script" not in made


def test_shares() -> None:
    assert [share(math.log(p)) for p in (1.0, 0.621, 0.0026, 3e-6)] == ["100.0%", "62.1%", "0.26%", "3e-06"]
