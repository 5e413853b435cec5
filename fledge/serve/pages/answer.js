// One model's answer in one turn: its text, calls of tools, what went wrong, and what can be done with it.
import { shownVersion } from "./conversation.js";
import { appendText, drawText, placesOf } from "./tokens.js";

export function make(tag, name, ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children);
  return element;
}

export function button(words, title, act, name = "quiet") {
  const element = make("button", name, words);
  element.type = "button";
  if (title) element.title = title;
  element.addEventListener("click", act);
  return element;
}

const ENDINGS = {
  length: "Cut off at max tokens.", stopped: "Stopped.", context: "The model’s context is full.",
  content_filter: "Held back by a filter.", edited: "Written by you.",
};

// `acts`: isRunning(slot), isWritten(), stop(slot), again(slot), retry(slot), goOn(slot), edit(slot, text),
// results(slot, texts), wrong(slot), show(slot, at), canCorrect.
export function answerView(slot, acts) {
  const name = make("span", "model-name");
  appendText(name, slot.model);
  const versions = make("span", "versions");
  const place = make("span", "small muted");
  const earlier = button("‹", "The version before", () => acts.show(slot, slot.at - 1));
  const later = button("›", "The next version", () => acts.show(slot, slot.at + 1));
  versions.append(earlier, place, later);
  const figures = make("span", "figures small muted");
  const parts = make("div", "parts");
  const editor = make("div", "editor");
  editor.hidden = true;

  const buttons = {
    stop: button("Stop", "Stop this answer (Esc stops all)", () => acts.stop(slot)),
    again: button("Regenerate", "Another answer; this one stays", () => acts.again(slot)),
    goOn: button("Continue", "Let the model write on where it ended", () => acts.goOn(slot)),
    copy: button("Copy", "The text as it was written", copy),
    edit: button("Edit", "Write the answer that the model should have given, and go on with it", edit),
    wrong: button("This answer is wrong", "Store a better one, for training", () => acts.wrong(slot)),
  };
  const footer = make("footer", "", ...Object.values(buttons));
  const element = make("article", "answer", make("header", "", name, versions, make("span", "grow"), figures), parts, editor, footer);
  element.dataset.model = slot.model;
  element.ariaLabel = `Answer of ${slot.model}`;
  let shown = null; // the parts that stand in the page

  function draw() {
    const { parts: list } = shownVersion(slot);
    const running = acts.isRunning(slot);
    const last = list.at(-1);
    if (shown !== list || parts.children.length !== list.length) {
      const focused = parts.contains(document.activeElement);
      parts.replaceChildren(...list.map(() => partElement()));
      shown = list;
      if (focused) parts.lastChild.firstChild.focus({ preventScroll: true }); // the arrow keys go on
    }
    list.forEach((part, number) => drawPart(parts.children[number], part, running && part === last, part === last));
    versions.hidden = slot.versions.length < 2;
    place.textContent = `${slot.at + 1}/${slot.versions.length}`;
    earlier.disabled = running || slot.at === 0;
    later.disabled = running || slot.at === slot.versions.length - 1;
    figures.textContent = running ? "" : figuresOf(last);
    element.classList.toggle("running", running);
    const editing = !editor.hidden;
    footer.hidden = editing;
    buttons.stop.hidden = !running;
    buttons.again.hidden = running || Boolean(last.error); // Retry stands beside the error
    buttons.goOn.hidden = running || !last.text || last.calls.length > 0 || last.finish === "stop";
    buttons.copy.hidden = buttons.edit.hidden = running || !last.text;
    buttons.wrong.hidden = running || !acts.canCorrect || (!last.text && !last.calls.length);
  }

  function partElement() {
    const body = make("div", "body");
    body.dir = "auto";
    body.tabIndex = 0;
    body.role = "group";
    return make("div", "part", body, make("div", "calls"), make("p", "note small"));
  }

  function drawPart(into, part, running, isLast) {
    const [body, calls, note] = into.children;
    const places = placesOf(part.text, part.tokens);
    body.answer = { slot, part, places };
    drawText(body, part.text, part.tokens, places, acts.isWritten());
    body.hidden = !part.text && !part.tokens.length;
    body.ariaLabel = part.tokens.length ? `Text of ${slot.model}. Left and right arrow: token by token.` : `Text of ${slot.model}`;
    drawCalls(calls, part, running, isLast);
    note.replaceChildren();
    note.hidden = true;
    note.classList.toggle("bad-text", Boolean(part.error) && !running);
    const say = (...words) => { note.hidden = false; note.append(...words); };
    if (running) {
      if (!part.text && !part.calls.length) say(make("span", "waiting", "…"));
    } else if (part.error) {
      appendText(note, `${part.error} `);
      say(button("Retry", "Ask again", () => acts.retry(slot), ""));
    } else if (ENDINGS[part.finish]) {
      say(ENDINGS[part.finish]);
    } else if (!part.text && !part.calls.length) {
      say("The model ended its answer at once.");
    }
  }

  function drawCalls(into, part, running, isLast) {
    const open = isLast && !running && part.calls.length > 0 && !part.error;
    const key = JSON.stringify([part.calls, part.results, open]);
    if (into.dataset.key === key) return;
    into.dataset.key = key;
    const fields = [];
    const drawn = part.calls.map((call) => {
      const title = make("h4", "", "Calls ");
      const called = make("code");
      appendText(called, call.name);
      title.append(called);
      const text = make("pre");
      text.tabIndex = 0;
      appendText(text, pretty(call.arguments));
      const box = make("section", "call", title, text);
      const result = part.results.find((one) => one.id === call.id);
      if (result) {
        const given = make("pre");
        appendText(given, result.content);
        box.append(make("span", "small muted", "Result"), given);
      } else if (open) {
        const field = make("textarea");
        field.rows = 2;
        field.placeholder = "What the tool gives back";
        field.ariaLabel = `Result of ${call.name}`;
        fields.push({ id: call.id, field });
        box.append(field);
      }
      return box;
    });
    into.replaceChildren(...drawn);
    if (open) {
      const send = () => acts.results(slot, fields.map(({ id, field }) => ({ id, content: field.value })));
      into.append(button(fields.length > 1 ? "Send results" : "Send result", "The model goes on with it", send, ""));
    }
  }

  async function copy() {
    const text = shownVersion(slot).parts.map((part) => part.text).join("\n\n");
    try {
      await navigator.clipboard.writeText(text);
      buttons.copy.textContent = "Copied";
    } catch {
      buttons.copy.textContent = "Not allowed";
    }
    setTimeout(() => { buttons.copy.textContent = "Copy"; }, 1500);
  }

  function edit() {
    parts.hidden = true;
    openEditor(editor, shownVersion(slot).parts.at(-1).text, "Keep", (text) => {
      parts.hidden = false;
      draw();
      if (text === null) buttons.edit.focus();
      else acts.edit(slot, text);
    });
    draw();
  }

  return { element, draw };
}

function figuresOf(part) {
  const made = part.usage?.completion_tokens ?? 0; // without what stood there when a branch began
  const count = part.tokens.filter((token) => !token.x).length || made;
  if (!count) return "";
  const speed = made / part.seconds;
  const rate = made && part.seconds > 0.05 ? ` · ${speed.toFixed(speed < 10 ? 1 : 0)}/s` : "";
  return `${count} token${count === 1 ? "" : "s"}${rate}`;
}

function pretty(text) {
  try { return JSON.stringify(JSON.parse(text), null, 2); } catch { return text; }
}

// A field in the place of a text; `finish` gets the new text, or null.
export function openEditor(into, text, verb, finish) {
  const field = make("textarea");
  field.value = text;
  field.dir = "auto";
  field.ariaLabel = "The text";
  const done = (value) => {
    into.hidden = true;
    into.replaceChildren();
    finish(value);
  };
  const save = () => { if (field.value.trim()) done(field.value); };
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape") {
      event.stopPropagation();
      done(null);
    } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      save();
    }
  });
  const row = make("div", "row end", button("Cancel", "Esc", () => done(null)), button(verb, "Ctrl Enter", save, "primary"));
  into.replaceChildren(field, row);
  into.hidden = false;
  field.rows = Math.min(16, Math.max(2, text.split("\n").length + 1));
  field.focus();
}
