"""Schemathesis makes requests from the server's own description: right ones, wrong ones, odd ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx2
import pytest

from .live import Server, program, run, served

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.slow
def test_no_request_finds_an_error_of_the_server(assistant: Path, tmp_path: Path) -> None:
    with served("--model", assistant, "--max-tokens", 8, "--at-once", 8) as server:
        run(
            [
                program("schemathesis", "schemathesis"), "run", f"{server.url}/openapi.json",
                "--checks", CHECKS, "--max-examples", 15, "--seed", 1, "--phases", "coverage,fuzzing",
                "--report", "junit", "--report-junit-path", tmp_path / "report.xml",
                "--suppress-health-check", "all",
            ],
            tmp_path,
        )  # fmt: skip
        described = httpx2.get(f"{server.url}/openapi.json").json()["paths"]
        log = server.log.read_text()
        assert alive(server)
    for path, methods in described.items():
        for method in methods:
            place = re.escape(path).replace(r"\{model\}", r"\S+")
            assert re.search(rf" {method.upper()} {place} ", log), f"{method} {path} was not tried"
    statuses = {int(found) for found in re.findall(r" (\d\d\d) [\d.]+ s", log)}
    assert {200, 400} <= statuses and max(statuses) < 500


def alive(server: Server) -> bool:
    body = {"messages": [{"role": "user", "content": "Say hello."}], "temperature": 0}
    answer = httpx2.post(f"{server.v1}/chat/completions", content=json.dumps(body), headers=JSON)
    return answer.status_code == 200


JSON = {"content-type": "application/json"}
