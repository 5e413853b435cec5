// What leaves the page: the conversation as a file, and corrections.
import { conversations, messagesFor, partMessages, shownVersion, state, tools } from "./conversation.js";
import { apiKey, postJson } from "./stream.js";

const at = (id) => document.getElementById(id);

function download(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

export function exportJson() {
  let given = null;
  try { given = tools(); } catch { /* broken ones were never sent */ }
  const rows = conversations().map(({ model, messages, settings: used }) => ({
    messages, ...(given && { tools: given }), model, ...used,
  }));
  download("conversation.jsonl", "application/jsonl", rows.map((row) => `${JSON.stringify(row)}\n`).join(""));
}

export function exportMarkdown() {
  const lines = [];
  if (state.system.trim()) lines.push("## System", state.system);
  for (const turn of state.turns) {
    lines.push("## You", turn.user);
    for (const slot of turn.slots) {
      lines.push(`## ${slot.model}`);
      for (const part of shownVersion(slot).parts) {
        if (part.text) lines.push(part.text);
        for (const call of part.calls) lines.push(`Calls \`${call.name}\`:`, fenced(call.arguments));
        for (const result of part.results) lines.push("Result:", fenced(result.content));
      }
    }
  }
  download("conversation.md", "text/markdown", `${lines.join("\n\n")}\n`);
}

function fenced(text) {
  const longest = Math.max(2, ...[...text.matchAll(/`+/g)].map(([run]) => run.length));
  const fence = "`".repeat(longest + 1);
  return `${fence}\n${text}\n${fence}`;
}

// The form behind "This answer is wrong": the answer, to be mended.
export function startCorrections(stored) {
  const dialog = at("wrong-dialog");
  let open = null; // { number, slot, part, key }

  async function store() {
    const text = at("correction").value;
    const { number, slot, part, before, key } = open;
    at("wrong-problem").textContent = "";
    if (!text.trim()) at("wrong-problem").textContent = "Write an answer first.";
    else if (text === part.text) at("wrong-problem").textContent = "Nothing changed yet.";
    if (at("wrong-problem").textContent) return;
    at("store").disabled = true;
    try {
      await postJson("/corrections", {
        key, model: slot.model, correction: text, sampling: part.settings ?? {},
        prompt: [...messagesFor(number, slot.model), ...partMessages(before)],
        rejected: partMessages([{ ...part, results: [] }])[0],
        ...(toolsOrNull() && { tools: toolsOrNull() }),
      });
      dialog.close();
      stored(slot);
    } catch (error) {
      at("wrong-problem").textContent = `Not stored: ${error.message}`;
      if (error.status === 401) apiKey.set("");
    } finally {
      at("store").disabled = false;
    }
  }

  at("store").addEventListener("click", store);
  at("correction").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) store();
  });
  return (number, slot) => {
    const { parts } = shownVersion(slot);
    // The same form stores one correction, however often it is sent.
    open = { number, slot, part: parts.at(-1), before: parts.slice(0, -1), key: crypto.getRandomValues(new Uint32Array(4)).join("-") };
    at("correction").value = open.part.text;
    at("wrong-prompt").textContent = state.turns[number].user.slice(0, 300);
    at("wrong-problem").textContent = "";
    dialog.showModal();
    at("correction").focus();
  };
}

function toolsOrNull() {
  try { return tools(); } catch { return null; }
}

