"""How the `openai` client fares with a busy server: `retrying.py BASE_URL KEY`; JSON on the last line."""

from __future__ import annotations

import json
import sys
from typing import Any

import openai

MODEL = "assistant"
HELLO: Any = [{"role": "user", "content": "Say hello."}]
client = openai.OpenAI(base_url=sys.argv[1], api_key=sys.argv[2], max_retries=0)


def refused(client: openai.OpenAI) -> Any:
    try:
        client.chat.completions.create(model=MODEL, messages=HELLO)
    except openai.APIStatusError as error:
        return [type(error).__name__, error.code, error.response.headers.get("retry-after")]
    return None


def main() -> None:
    found: dict[str, Any] = {"wrong_key": refused(client.with_options(api_key="wrong"))}
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, max_tokens=900, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    found["busy"] = refused(client)
    raw = client.with_options(max_retries=8).chat.completions.with_raw_response
    answer = raw.create(model=MODEL, messages=HELLO, temperature=0)
    found["retried"] = answer.parse().choices[0].message.content
    found["retries"] = answer.retries_taken
    stream.close()
    print(json.dumps(found))


main()
