"""Stands in for the program `vllm`, which needs a GPU: those of its flags that we pass, read as vLLM 0.32
does, its /health and its key, with our own engine behind them. Says first what it was called with."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from fledge.serve.app import make_app
from fledge.serve.guard import Limits
from fledge.serve.keys import Doorkeeper
from fledge.serve.running import new_server, run
from fledge.serve.service import Service


def length(text: str) -> int | None:
    return None if text == "auto" else int(text)


def parser() -> argparse.ArgumentParser:
    program = argparse.ArgumentParser("vllm", allow_abbrev=False)
    serve = program.add_subparsers(required=True, dest="verb").add_parser("serve", allow_abbrev=False)
    serve.add_argument("model_tag")
    serve.add_argument("--served-model-name", nargs="+")
    serve.add_argument("--uds")
    serve.add_argument("--dtype", choices=["auto", "bfloat16", "float", "float16", "float32", "half"])
    serve.add_argument("--max-model-len", type=length)
    serve.add_argument("--max-num-seqs", type=int, default=256)
    serve.add_argument("--generation-config", default="auto")
    serve.add_argument("--override-generation-config", type=json.loads, default={})
    serve.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    serve.add_argument("--enable-auto-tool-choice", action="store_true")
    serve.add_argument("--tool-call-parser")
    serve.add_argument("--disable-uvicorn-access-log", action="store_true")
    serve.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    return program


def main(arguments: Sequence[str]) -> None:
    from tests.serve.real import load

    asked = parser().parse_args(arguments)
    reports = os.environ["VLLM_NO_USAGE_STATS"]
    print(json.dumps({"process": os.getpid(), "called": list(arguments), "reports": reports}), flush=True)
    most = asked.override_generation_config.get("max_new_tokens")
    name = asked.served_model_name[0]
    served = load(
        Path(asked.model_tag),
        name,
        min(asked.max_num_seqs, 4),
        context=asked.max_model_len,
        answer_tokens=most,
    )
    service = Service({name: served})
    app = make_app(service, limits=Limits(), door=Doorkeeper((os.environ["VLLM_API_KEY"],), True, ()))
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(asked.uds)
    listening.listen(64)
    try:
        asyncio.run(run(new_server(app, 1.0), service, listening, 1.0))
    finally:
        served.worker.close()


if __name__ == "__main__":
    main(sys.argv[1:])
