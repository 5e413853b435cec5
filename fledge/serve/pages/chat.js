// The chat page: who is asked what, and what the reader does.
import { answerView, button, make, openEditor } from "./answer.js";
import * as asking from "./ask.js";
import { hideCard, startCandidates } from "./candidates.js";
import { keep, newPart, numberOf, NUMBERS, restore, settings, shownVersion, state, tools } from "./conversation.js";
import { exportJson, exportMarkdown, startCorrections } from "./save.js";
import { apiKey, getJson } from "./stream.js";
import { appendText, placesOf } from "./tokens.js";

const at = (id) => document.getElementById(id);
const views = new WeakMap(); // slot -> its view
let models = [];

// --- asking -------------------------------------------------------------------------------------------------

function newSlot(model, used) {
  return { model, versions: [{ parts: [newPart(used)] }], at: 0 };
}

// What is asked with; null, and a line that says why, where a setting is wrong.
function asked() {
  try {
    return { settings: settings(), tools: tools() };
  } catch (error) {
    say(error.message, true);
    openSettings(true);
    return null;
  }
}

function prepared(act) {
  const used = asked();
  if (used) act(used);
}

function send(text) {
  const used = asked();
  if (!used || !text.trim()) return false;
  if (!state.selected.length) {
    say("Choose a model first.", true);
    return false;
  }
  const turn = { user: text, slots: state.selected.map((model) => newSlot(model, used.settings)) };
  state.turns.push(turn);
  drawTurns();
  scrollTo({ top: document.documentElement.scrollHeight });
  turn.slots.forEach((slot) => ask(slot, used));
  return true;
}

function ask(slot, used) {
  say("");
  asking.ask(slot, used, (one, now) => (now ? drawSlot(one) : drawSoon(one)), (one, error) => {
    if (error?.status === 401) askForKey();
    if (!asking.isAnyRunning()) at("said").textContent = "Answered.";
    save();
  });
}

function addVersion(slot, parts) {
  slot.versions.push({ parts });
  slot.at = slot.versions.length - 1;
}

// Another answer that is the same up to a token, where it has another candidate.
function branch(slot, part, index, candidate) {
  const { parts } = shownVersion(slot);
  const used = asked();
  if (!used) return;
  const token = part.tokens[index];
  const start = placesOf(part.text, part.tokens)[index] ?? part.text.length;
  const made = { ...newPart(used.settings), text: part.text.slice(0, start), tokens: part.tokens.slice(0, index) };
  made.tokens.push({ t: candidate.t, l: candidate.l, c: token.c, ...(candidate.x && { x: 1 }) });
  addVersion(slot, [...parts.slice(0, parts.indexOf(part)), made]);
  if (candidate.x) {
    made.finish = "stop";
    drawSlot(slot);
    save();
  } else {
    made.text += candidate.t;
    ask(slot, used);
  }
}

const acts = {
  canCorrect: document.body.dataset.corrections === "yes",
  isRunning: asking.isRunning,
  isWritten: () => state.written,
  stop: asking.stop,
  again: (slot) => prepared((used) => {
    addVersion(slot, [newPart(used.settings)]);
    ask(slot, used);
  }),
  retry: (slot) => prepared((used) => { // in the place of what failed
    const { parts } = shownVersion(slot);
    const { text, tokens, from } = parts.at(-1);
    const part = { ...newPart(used.settings), text: text.slice(0, from.text), tokens: tokens.slice(0, from.tokens) };
    parts.splice(-1, 1, part);
    ask(slot, used);
  }),
  goOn: (slot) => prepared((used) => ask(slot, used)),
  edit(slot, text) {
    const parts = shownVersion(slot).parts.slice(0, -1);
    addVersion(slot, [...parts, { ...newPart({}), text, finish: "edited" }]);
    drawSlot(slot);
    save();
  },
  results: (slot, results) => prepared((used) => {
    const { parts } = shownVersion(slot);
    parts.at(-1).results = results;
    parts.push(newPart(used.settings));
    ask(slot, used);
  }),
  wrong: (slot) => openCorrection(numberOf(slot), slot),
  show(slot, place) {
    slot.at = place;
    drawSlot(slot);
    save();
  },
};
const openCorrection = startCorrections((slot) => say(`Stored a correction of ${slot.model}’s answer.`));

// --- drawing ------------------------------------------------------------------------------------------------

const due = new Set();
let drawing = false;
let cost = 0;

function viewOf(slot) {
  if (!views.has(slot)) views.set(slot, answerView(slot, acts));
  return views.get(slot);
}

function drawSlot(slot) {
  due.delete(slot);
  followed(() => viewOf(slot).draw());
  drawButtons();
}

// While tokens arrive: at most every 40 ms, and less often where drawing is slow.
function drawSoon(slot) {
  due.add(slot);
  if (drawing) return;
  drawing = true;
  setTimeout(() => {
    const start = performance.now();
    const slots = [...due];
    due.clear();
    followed(() => slots.forEach((one) => viewOf(one).draw()));
    cost = performance.now() - start;
    drawing = false;
  }, Math.max(40, 3 * cost));
}

// Who reads the end of the page stays there while it grows.
function followed(draw) {
  const root = document.documentElement;
  const atEnd = root.scrollHeight - root.scrollTop - innerHeight < 60;
  draw();
  if (atEnd && asking.isAnyRunning()) root.scrollTop = root.scrollHeight;
}

function drawTurns() {
  hideCard();
  at("welcome").hidden = state.turns.length > 0;
  at("turns").replaceChildren(...state.turns.map(turnElement));
  drawButtons();
}

function turnElement(turn, number) {
  const text = make("div", "said plain");
  text.dir = "auto";
  appendText(text, turn.user);
  const editor = make("div", "editor");
  editor.hidden = true;
  const edit = button("Edit", "Ask something else here; what follows goes", () => {
    text.hidden = edit.hidden = true;
    openEditor(editor, turn.user, "Ask", (value) => {
      text.hidden = edit.hidden = false;
      if (value === null) edit.focus();
      else askAnew(number, value);
    });
  });
  edit.classList.add("edit");
  const answers = make("div", "answers", ...turn.slots.map((slot) => {
    const view = viewOf(slot);
    view.draw();
    return view.element;
  }));
  const element = make("section", "turn", make("div", "user", text, edit, editor), answers);
  element.style.setProperty("--columns", turn.slots.length);
  return element;
}

function askAnew(number, text) {
  const before = state.turns;
  asking.stopAll();
  state.turns = before.slice(0, number);
  if (!send(text)) {
    state.turns = before;
    drawTurns();
  } else if (number < before.length) {
    offerUndo(before.length - number > 1 ? "What followed is gone." : "Asked anew.", before);
  }
}

function offerUndo(words, before) {
  say(`${words} `);
  at("line").append(button("Undo", "", () => {
    asking.stopAll();
    state.turns = before;
    drawTurns();
    save();
    say("");
  }));
}

function drawButtons() {
  at("send").hidden = asking.isAnyRunning();
  at("stop").hidden = !asking.isAnyRunning();
  at("export").disabled = at("clear").disabled = state.turns.length === 0;
  at("view").setAttribute("aria-pressed", String(state.written));
  at("shade").setAttribute("aria-pressed", String(state.shaded));
  document.body.classList.toggle("shaded", state.shaded);
}

function say(words, bad = false) {
  const line = at("line");
  line.replaceChildren();
  appendText(line, words);
  line.hidden = !words;
  line.classList.toggle("bad-text", bad);
}

function save() {
  if (!keep()) say("This tab has no room to keep the conversation: export it before you leave.", true);
}

// --- models and keys ----------------------------------------------------------------------------------------

async function loadModels() {
  let chatting = [];
  try {
    const { data } = await getJson("/v1/models");
    models = data.filter((model) => model.kind !== "reward").map((model) => model.id); // those only judge
    chatting = data.filter((model) => (model.kind ?? "chat") === "chat").map((model) => model.id);
  } catch (error) {
    if (error.status === 401) askForKey();
    say(`${error.message} `, true);
    at("line").append(button("Retry", "", loadModels, ""));
    return;
  }
  say("");
  if (!models.length) say("This server has no model that writes.", true);
  const first = chatting.length ? chatting : models;
  const known = (state.selected ?? first.slice(0, 3)).filter((model) => models.includes(model));
  state.selected = known.length ? known : first.slice(0, 1);
  drawModels();
  document.documentElement.dataset.ready = "yes";
}

function drawModels() {
  if (models.length === 1) {
    const only = make("span", "muted only");
    appendText(only, models[0]);
    at("models").replaceChildren(only);
    return;
  }
  at("models").replaceChildren(...models.map((model) => {
    const chip = button("", `Ask ${model}`, () => {
      const chosen = state.selected.includes(model);
      state.selected = models.filter((one) => (one === model ? !chosen : state.selected.includes(one)));
      chip.setAttribute("aria-pressed", String(!chosen));
      save();
    }, "chip");
    appendText(chip, model);
    chip.setAttribute("aria-pressed", String(state.selected.includes(model)));
    return chip;
  }));
}

function askForKey() {
  if (at("key-dialog").open) return;
  at("api-key").value = apiKey.get();
  at("key-dialog").showModal();
}

at("key-dialog").querySelector("form").addEventListener("submit", () => {
  apiKey.set(at("api-key").value.trim());
  loadModels();
});

// --- what the reader does -----------------------------------------------------------------------------------

function openSettings(open) {
  at("settings-form").hidden = !open;
  at("settings").setAttribute("aria-expanded", String(open));
  if (open) at("settings-form").scrollIntoView({ block: "nearest" });
}

function submit() {
  if (asking.isAnyRunning() || !models.length) return;
  if (send(at("prompt").value)) {
    at("prompt").value = "";
    at("prompt").style.height = "";
    save();
  }
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
if (!CSS.supports("field-sizing", "content")) { // the field grows with what is written
  at("prompt").addEventListener("input", () => {
    at("prompt").style.height = "auto";
    at("prompt").style.height = `${at("prompt").scrollHeight + 2}px`;
  });
}
at("prompt").addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  const control = event.ctrlKey || event.metaKey;
  const phone = matchMedia("(hover: none) and (pointer: coarse)").matches; // its Enter is the only new line
  if (event.key === "Enter" && !event.shiftKey && (control || !phone)) {
    event.preventDefault();
    submit();
  } else if (event.key === "ArrowUp" && !at("prompt").value && state.turns.length) {
    event.preventDefault();
    [...document.querySelectorAll(".user .edit")].at(-1).click();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
  if (!hideCard()) asking.stopAll();
});
at("stop").addEventListener("click", asking.stopAll);
at("settings").addEventListener("click", () => openSettings(at("settings-form").hidden));
at("settings-form").addEventListener("submit", (event) => event.preventDefault());
for (const name of ["system", "tools", ...NUMBERS]) {
  at(name).addEventListener("input", () => {
    if (NUMBERS.includes(name)) state.settings[name] = at(name).value;
    else state[name] = at(name).value;
    say("");
  });
  at(name).addEventListener("change", save);
}
for (const [id, name] of [["view", "written"], ["shade", "shaded"]]) {
  at(id).addEventListener("click", () => {
    state[name] = !state[name];
    if (name === "written") drawTurns();
    else drawButtons();
    save();
  });
}
at("clear").addEventListener("click", () => {
  const before = state.turns;
  asking.stopAll();
  state.turns = [];
  drawTurns();
  save();
  offerUndo("Cleared.", before);
  at("prompt").focus();
});
at("export").addEventListener("click", () => at("export-dialog").showModal());
at("help").addEventListener("click", () => at("help-dialog").showModal());
for (const [id, write] of [["export-json", exportJson], ["export-markdown", exportMarkdown]]) {
  at(id).addEventListener("click", () => {
    write();
    at("export-dialog").close();
  });
}
for (const close of document.querySelectorAll("[data-close]")) {
  close.addEventListener("click", () => close.closest("dialog").close());
}
addEventListener("pagehide", () => keep());

restore();
for (const name of NUMBERS) at(name).value = state.settings[name] ?? "";
at("system").value = state.system;
at("tools").value = state.tools;
startCandidates(at("turns"), { branch, busy: asking.isRunning });
drawTurns();
loadModels();
if (!matchMedia("(max-width: 760px)").matches) at("prompt").focus();
