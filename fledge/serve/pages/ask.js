// One answer being written: the request, and what comes of it.
import { messagesFor, numberOf, partMessages, shownVersion } from "./conversation.js";
import { streamEvents } from "./stream.js";
import { tokenReader } from "./tokens.js";

const running = new Map(); // slot -> AbortController

export const isRunning = (slot) => running.has(slot);
export const isAnyRunning = () => running.size > 0;
export const stop = (slot) => running.get(slot)?.abort();
export const stopAll = () => [...running.values()].forEach((control) => control.abort());

// Lets the model write the last part of the version shown, on from the text that it has.
// `drawn` gets called with the slot and whether that is urgent, `ended` with it and the error, if one was.
export async function ask(slot, used, drawn, ended) {
  const { parts } = shownVersion(slot);
  const part = parts.at(-1);
  const goesOn = part.text !== "";
  const messages = [...messagesFor(numberOf(slot), slot.model), ...partMessages(parts.slice(0, -1))];
  const control = new AbortController();
  const from = { text: part.text.length, tokens: part.tokens.length };
  Object.assign(part, { settings: used.settings, finish: null, error: null, usage: null, from });
  running.set(slot, control);
  drawn(slot, true);
  const read = tokenReader();
  const start = performance.now();
  let failed = null;
  try {
    await streamEvents("/v1/chat/completions", {
      model: slot.model, messages: goesOn ? [...messages, { role: "assistant", content: part.text }] : messages,
      ...used.settings, stream: true, stream_options: { include_usage: true }, logprobs: true, top_logprobs: 10,
      ...(used.tools && { tools: used.tools }),
      ...(goesOn && { add_generation_prompt: false, continue_final_message: true }),
    }, control.signal, (chunk) => {
      take(part, chunk, read);
      drawn(slot, false);
    });
    part.finish ??= "stop";
  } catch (error) {
    failed = error;
    if (error.name === "AbortError") part.finish = "stopped";
    else part.error = error.message;
  }
  part.seconds = (performance.now() - start) / 1000;
  running.delete(slot);
  drawn(slot, true);
  ended(slot, failed);
}

function take(part, chunk, read) {
  if (chunk.usage) part.usage = chunk.usage;
  const [choice] = chunk.choices ?? [];
  if (!choice) return;
  part.text += choice.delta?.content ?? "";
  part.tokens.push(...(choice.logprobs?.content ?? []).map(read));
  for (const { index = 0, id, function: named } of choice.delta?.tool_calls ?? []) {
    part.calls[index] ??= { id: "", name: "", arguments: "" };
    const call = part.calls[index];
    if (id) call.id = id;
    call.name += named?.name ?? "";
    call.arguments += named?.arguments ?? "";
  }
  if (choice.finish_reason) part.finish = choice.finish_reason;
}
