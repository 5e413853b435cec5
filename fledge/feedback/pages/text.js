// A demonstration or a correction: one text, and for a correction what it changes.
import { difference } from "./difference.js";

export function startText(task, changed) {
  const field = document.getElementById("text");
  const original = (task.original ?? "").replace(/\r\n?/g, "\n"); // as a text field keeps it
  const count = document.getElementById("change-count");
  const shown = document.getElementById("difference");
  let timer = 0;

  function draw() {
    if (!count) return;
    const parts = difference(original, field.value);
    const words = (kind) => parts.filter((part) => part.kind === kind && part.text.trim()).length;
    const added = words("added");
    const removed = words("removed");
    count.textContent = added + removed === 0 ? "Nothing changed yet." : `${added} added, ${removed} removed; shown below.`;
    shown.hidden = field.value === original;
    shown.replaceChildren(...parts.map(({ kind, text }) => {
      const element = document.createElement(kind === "added" ? "ins" : kind === "removed" ? "del" : "span");
      element.textContent = text;
      return element;
    }));
  }
  function set(text) {
    field.value = text;
    draw();
    changed();
  }
  field.value = task.start?.text ?? original;
  draw();
  field.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(draw, 200);
    changed();
  });
  document.getElementById("restore")?.addEventListener("click", () => { set(original); field.focus(); });
  // Not on a phone: its keyboard would hide the prompt before it is read.
  if (!matchMedia("(max-width: 760px)").matches) {
    field.focus({ preventScroll: true });
    field.setSelectionRange(field.value.length, field.value.length);
  }
  return {
    value: () => ({ text: field.value }),
    problem() {
      if (!field.value.trim()) return "Write an answer first.";
      if (task.kind === "correction" && field.value === original) return "Nothing changed: edit the answer, or skip it.";
      return null;
    },
    showProblem: () => field.focus(),
    clear: () => set(original),
    key(name) {
      if (name !== "e") return false;
      field.focus();
      return true;
    },
  };
}
