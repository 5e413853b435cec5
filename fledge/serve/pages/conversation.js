// What the page holds: turns, each with the answers of one or more models, and the settings. It lives in this
// tab (sessionStorage) until it is cleared.
//
// turn: { user, slots }; slot: { model, versions, at }; version: { parts }. A part is one message of the
// assistant: { text, tokens, calls, results, finish, error, usage, seconds, settings, from }; `from` tells what
// stood there before the model wrote on. Calls of tools with results are followed by another part.
const STORED = "fledge-chat";

export const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

export const state = {
  turns: [], selected: null, system: "", tools: "", written: false, shaded: false,
  settings: { temperature: "0.8", max_tokens: "512" },
};

export function restore() {
  const fresh = structuredClone(state);
  try {
    Object.assign(state, JSON.parse(sessionStorage.getItem(STORED) ?? "{}"));
    for (const part of allParts()) {
      if (!part.finish && !part.error) part.error = "The page was left before the answer was whole.";
    }
  } catch { // nothing that can be read: begin anew
    Object.assign(state, fresh);
  }
}

// Keeps the state; where the tab has no room for all of it, the oldest answers lose their candidates first.
export function keep() {
  const slim = [];
  for (let i = 0; i <= 6; i += 1) {
    try {
      sessionStorage.setItem(STORED, JSON.stringify(state, (name, value) => (slim.includes(value) ? [] : value)));
      return true;
    } catch { /* too long */ }
    const full = allParts().map((part) => part.tokens).filter((tokens) => tokens.length && !slim.includes(tokens));
    slim.push(...full.slice(0, Math.ceil(full.length / 2)));
  }
  return false;
}

function allParts() {
  return state.turns.flatMap((turn) => turn.slots.flatMap((slot) => slot.versions.flatMap(({ parts }) => parts)));
}

export const newPart = (settings) => ({
  text: "", tokens: [], calls: [], results: [], finish: null, error: null, usage: null, seconds: 0, settings,
  from: { text: 0, tokens: 0 },
});

export const numberOf = (slot) => state.turns.findIndex((turn) => turn.slots.includes(slot));

export const shownVersion = (slot) => slot.versions[slot.at];

function assistantMessage(part) {
  const message = { role: "assistant", content: part.text };
  if (part.calls.length) {
    message.tool_calls = part.calls.map(({ id, name, arguments: text }) => ({
      id, type: "function", function: { name, arguments: text },
    }));
  }
  return message;
}

const resultMessages = (part) => part.results.map(({ id, content }) => ({ role: "tool", tool_call_id: id, content }));

// What some parts of a version say: each with the results of its tools.
export const partMessages = (parts) => parts.flatMap((part) => [assistantMessage(part), ...resultMessages(part)]);

const isSaid = (slot) => shownVersion(slot).parts.some((part) => part.text || part.calls.length);

// The messages that `model` reads before its answer in turn `number`: its own answers, or another model's in a
// turn that it wasn't asked in.
export function messagesFor(number, model) {
  const messages = state.system.trim() ? [{ role: "system", content: state.system }] : [];
  state.turns.slice(0, number + 1).forEach((turn, place) => {
    messages.push({ role: "user", content: turn.user });
    if (place === number) return;
    const said = turn.slots.filter(isSaid);
    const slot = said.find((one) => one.model === model) ?? said[0];
    if (slot) messages.push(...partMessages(shownVersion(slot).parts));
  });
  return messages;
}

// The settings as numbers; those left empty are the server's own. Throws Error for what is no number.
export function settings() {
  const read = {};
  for (const name of NUMBERS) {
    const text = (state.settings[name] ?? "").trim();
    if (!text) continue;
    const value = Number(text);
    if (!Number.isFinite(value)) throw new Error(`${name} is ${text}; it must be a number.`);
    read[name] = value;
  }
  return read;
}

// The tools of the settings, or null. Throws Error for anything but a JSON list of objects.
export function tools() {
  if (!state.tools.trim()) return null;
  let list;
  try { list = JSON.parse(state.tools); } catch (error) { throw new Error(`The tools are no valid JSON: ${error.message}`); }
  const isObject = (one) => one && typeof one === "object" && !Array.isArray(one);
  if (!Array.isArray(list) || !list.every(isObject)) throw new Error("The tools must be a JSON list of objects.");
  return list.length ? list.map((one) => (one.function ? one : { type: "function", function: one })) : null;
}

// The whole conversation of each model that answered: { model, messages }.
export function conversations() {
  const models = [...new Set(state.turns.flatMap((turn) => turn.slots.map((slot) => slot.model)))];
  return models.map((model) => {
    const last = state.turns.findLastIndex((turn) => turn.slots.some((slot) => slot.model === model && isSaid(slot)));
    if (last < 0) return null;
    const slot = state.turns[last].slots.find((one) => one.model === model);
    const parts = shownVersion(slot).parts.filter((part) => part.text || part.calls.length);
    return { model, messages: [...messagesFor(last, model), ...partMessages(parts)], settings: parts.at(-1).settings };
  }).filter(Boolean);
}
