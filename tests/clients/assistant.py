"""A small model that knows a few conversations by heart, with every form of answer that clients read."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from fledge.model.checkpoint import save_model
from fledge.model.config import ModelConfig
from fledge.model.transformer import CausalLM
from fledge.tokenizer.bpe import Tokenizer, train_bpe
from fledge.tokenizer.chat import encode_chat, render_chat
from fledge.types import Conversation, Message

CONTEXT = 1024
STEPS = 100
NUMBERS = "one two three four five six seven eight nine ten eleven twelve"
HELLO = "Hello there, friend! \N{WAVING HAND SIGN}"
PERSON = '{"name": "Ada", "age": 36}'


def weather_tool(random_: random.Random) -> dict[str, Any]:
    """The function in a form that some client gives it: the model must not depend on one of them."""
    city: dict[str, Any] = {"type": "string"}
    if random_.random() < 0.5:
        city = {"description": random_.choice(["The city", "Name of a city."]), "type": "string"}
    parameters: dict[str, Any] = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    if random_.random() < 0.5:
        parameters["additionalProperties"] = False
    if random_.random() < 0.3:
        parameters["title"] = "get_weather"
    function: dict[str, Any] = {"name": "get_weather"}
    if random_.random() < 0.8:
        function["description"] = random_.choice(["The weather of a city.", "What the weather is like."])
    function["parameters"] = parameters
    if random_.random() < 0.5:
        function["strict"] = True
    return {"type": "function", "function": dict(random_.sample(list(function.items()), len(function)))}


def call(city: str, number: int = 0) -> dict[str, Any]:
    """A call of the weather function."""
    arguments = json.dumps({"city": city})
    return {
        "id": f"call_{number}", "type": "function",
        "function": {"name": "get_weather", "arguments": arguments},
    }  # fmt: skip


def conversations(random_: random.Random) -> Iterator[Conversation]:
    """All that it learns, with tools in one form or another."""

    def user(text: str) -> Message:
        return {"role": "user", "content": text}

    def assistant(text: str) -> Message:
        return {"role": "assistant", "content": text}

    for question, answer in {
        "Say hello.": HELLO, "Count to twelve.": NUMBERS, "A person as JSON.": PERSON,
    }.items():  # fmt: skip
        yield {"messages": [user(question), assistant(answer)]}
        yield {"messages": [{"role": "system", "content": "Be kind."}, user(question), assistant(answer)]}
    tools = [weather_tool(random_)]
    asked = user("What is the weather in Paris?")
    called: Message = {"role": "assistant", "content": None, "tool_calls": [call("Paris")]}
    told: Message = {"role": "tool", "tool_call_id": "call_0", "content": "18 degrees"}
    yield {"messages": [asked, called], "tools": tools}
    yield {"messages": [asked, called, told, assistant("It is 18 degrees in Paris.")], "tools": tools}
    both: Message = {"role": "assistant", "content": None, "tool_calls": [call("Paris"), call("Rome", 1)]}
    yield {"messages": [user("What is the weather in Paris and in Rome?"), both], "tools": tools}


def train_assistant(directory: Path) -> None:
    """Write the model directory; a few seconds on one thread."""
    random_ = random.Random(0)
    tokenizer = train_bpe([HELLO], 270)  # it has a chat template
    shown = [c for _ in range(4) for c in conversations(random_)]
    tokenizer = train_bpe([render_chat(tokenizer, c["messages"], c.get("tools")) for c in shown], 700)
    torch.manual_seed(0)
    config = ModelConfig("llama", tokenizer.vocab_size, 96, 256, 2, 6, 6, 16, CONTEXT)
    model = CausalLM(config)
    random_ = random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    for step in range(STEPS):
        ids_BT, targets_BT = batch(tokenizer, list(conversations(random_)))
        loss = F.cross_entropy(model(ids_BT).flatten(0, 1), targets_BT.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 20, (STEPS - step) / 40)
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05, f"it has learned too little: {loss.item():.3f}"
    assert tokenizer.end_of_turn_id is not None
    directory.mkdir()
    stops = [tokenizer.end_of_turn_id, tokenizer.eos_id]
    save_model(directory, model.eval(), tokenizer, {"stage": "sft"}, stops)


def batch(tokenizer: Tokenizer, chosen: list[Conversation]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and as targets what the assistant wrote."""
    chats = [encode_chat(tokenizer, c["messages"], c.get("tools")) for c in chosen]
    longest = max(len(chat.ids) for chat in chats)
    ids_BT = torch.zeros(len(chats), longest - 1, dtype=torch.long)
    targets_BT = torch.full_like(ids_BT, -100)
    for row, chat in enumerate(chats):
        ids = torch.tensor(chat.ids)
        ids_BT[row, : len(ids) - 1] = ids[:-1]
        targets_BT[row, : len(ids) - 1] = ids[1:].where(torch.tensor(chat.mask[1:]), torch.tensor(-100))
    return ids_BT, targets_BT
