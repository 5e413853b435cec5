// One task: drafts, time, keys, dialogs and the answer itself; each kind of task has a file of its own.
import { clock, isField, newKey, send, stopwatch, wait } from "./api.js";
import { startPairwise } from "./pairwise.js";
import { startRanking } from "./ranking.js";
import { startRating } from "./rating.js";
import { startText } from "./text.js";

const task = JSON.parse(document.getElementById("task").textContent);
const at = (id) => document.getElementById(id);
const starters = {
  ranking: startRanking, rating: startRating, pairwise: startPairwise, demonstration: startText, correction: startText,
};

let key = newKey(); // of this answer: sent again, it is stored once
let version = 0;
let saved = 0;
let saving = false;
let leaving = false;
let timer = 0;

const seconds = stopwatch(task.seconds, (value) => { at("time").textContent = clock(value); });
const kind = starters[task.kind](task, changed);

function changed() {
  version += 1;
  key = newKey();
  at("problem").textContent = "";
  at("status").textContent = "Saving…";
  clearTimeout(timer);
  timer = setTimeout(saveDraft, 400);
}

// The newest state, one request at a time; after a lost connection, again and again.
async function saveDraft() {
  if (saving || leaving) return;
  saving = true;
  while (saved < version && !leaving) {
    const now = version;
    try {
      await send(`/task/${task.id}/draft`, { body: kind.value(), seconds: seconds() });
      saved = now;
      if (saved === version) at("status").textContent = "Draft saved";
    } catch (error) {
      at("status").textContent = error.lost ? "Not saved: no connection. Trying again…" : `Not saved: ${error.message}`;
      if (!error.lost) break;
      await wait(2000);
    }
  }
  saving = false;
}

async function leave(path, body, button) {
  if (leaving) return;
  leaving = true;
  button.disabled = true;
  at("problem").textContent = "";
  for (let tries = 1; ; tries += 1) {
    try {
      const { next } = await send(path, { ...body, seconds: seconds(), key });
      location.assign(next);
      return;
    } catch (error) {
      if (!error.lost || tries === 15) {
        at("problem").textContent = error.message;
        break;
      }
      at("status").textContent = "Not sent: no connection. Trying again…";
      await wait(2000);
    }
  }
  leaving = false;
  button.disabled = false;
}

function submit() {
  at("problem").textContent = "";
  if (kind.advance?.()) return;
  const problem = kind.problem();
  if (problem) {
    at("problem").textContent = problem;
    kind.showProblem?.();
  } else {
    leave(`/task/${task.id}/answer`, { answer: kind.value(), order: task.order }, at("submit"));
  }
}

// A dialog that asks for a reason; digits choose one of those it offers.
function reasonDialog(name, sendReason) {
  const dialog = at(`${name}-dialog`);
  const field = at(`${name}-reason`);
  const choose = (reason) => {
    if (!reason.trim()) { field.focus(); return; }
    dialog.close();
    sendReason(reason.trim());
  };
  at(name).addEventListener("click", () => { dialog.showModal(); if (!dialog.querySelector("[data-reason]")) field.focus(); });
  dialog.querySelector("[data-send]").addEventListener("click", () => choose(field.value));
  for (const button of dialog.querySelectorAll("[data-reason]")) {
    button.addEventListener("click", () => choose(button.dataset.reason));
  }
  dialog.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter" && event.target === field) {
      event.preventDefault();
      choose(field.value);
    } else if (/^[1-9]$/.test(event.key) && event.target !== field && !event.ctrlKey && !event.metaKey && !event.altKey) {
      dialog.querySelectorAll("[data-reason]")[Number(event.key) - 1]?.click();
    }
  });
}

reasonDialog("skip", (reason) => leave(`/task/${task.id}/skip`, { reason }, at("skip")));
reasonDialog("flag", async (reason) => {
  try {
    await send(`/task/${task.id}/flag`, { reason, key: newKey() });
    at("status").textContent = "Flagged";
  } catch (error) {
    at("problem").textContent = `Not flagged: ${error.message}`;
  }
});

for (const button of document.querySelectorAll("[data-close]")) {
  button.addEventListener("click", () => button.closest("dialog").close());
}
at("help").addEventListener("click", () => at("help-dialog").showModal());
at("submit").addEventListener("click", submit);
at("clear-prefill")?.addEventListener("click", () => { kind.clear(); at("prefilled").hidden = true; });
at("previous").addEventListener("click", () => { if (task.previous) location.assign(task.previous); });
at("view").addEventListener("click", () => {
  const on = document.body.classList.toggle("as-written");
  at("view").setAttribute("aria-pressed", String(on));
});

// A click by pointer leaves no focus behind on a button, so that Enter goes on meaning "submit".
document.addEventListener("click", (event) => {
  const button = event.target instanceof Element ? event.target.closest("button") : null;
  if (button && event.detail > 0 && !button.closest("dialog")) button.blur();
});

const shortcuts = { p: "previous", s: "skip", l: "flag", v: "view", "?": "help" };

document.addEventListener("keydown", (event) => {
  if (event.isComposing || document.querySelector("dialog[open]")) return;
  const control = event.ctrlKey || event.metaKey;
  if (event.key === "Enter" && control) {
    event.preventDefault();
    submit();
    return;
  }
  if (control || event.altKey) return;
  if (isField(event.target)) {
    if (event.key === "Escape") event.target.blur(); // the single keys work again
    return;
  }
  const onControl = event.target instanceof Element && event.target.closest("button, a, summary");
  if (event.key === "Enter" || event.key === " ") {
    if (event.key === "Enter" && !onControl && !event.repeat) {
      event.preventDefault();
      submit();
    }
    return;
  }
  const name = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (kind.key?.(name, event)) {
    event.preventDefault();
  } else if (shortcuts[name] && !event.repeat) {
    event.preventDefault();
    at(shortcuts[name]).click();
  }
});

// Closing the tab: the last words still arrive.
addEventListener("pagehide", () => {
  if (leaving || saved === version) return;
  const body = JSON.stringify({ body: kind.value(), seconds: seconds() });
  fetch(`/task/${task.id}/draft`, {
    method: "POST", keepalive: true, headers: { "content-type": "application/json" }, body,
  }).catch(() => {});
});
document.documentElement.dataset.ready = "yes";
