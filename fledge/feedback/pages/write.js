// A prompt of the labeler's own with its ideal answer. The draft lives in this tab until it is saved.
import { newKey, send, stopwatch } from "./api.js";

const fields = ["prompt", "text"].map((id) => document.getElementById(id));
const problem = document.getElementById("problem");
const button = document.getElementById("submit");
const seconds = stopwatch(0, () => {});
let key = newKey();

const name = (field) => `fledge-write-${field.id}`;
for (const field of fields) {
  field.value = sessionStorage.getItem(name(field)) ?? "";
  field.addEventListener("input", () => {
    key = newKey();
    problem.textContent = "";
    sessionStorage.setItem(name(field), field.value);
    document.getElementById("status").textContent = "Draft kept in this tab";
  });
}
fields[0].focus();

async function save() {
  const empty = fields.find((field) => !field.value.trim());
  if (empty) {
    problem.textContent = empty.id === "prompt" ? "Write a prompt first." : "Write its answer too.";
    empty.focus();
    return;
  }
  button.disabled = true;
  try {
    const { next } = await send("/write", { prompt: fields[0].value, text: fields[1].value, seconds: seconds(), key });
    for (const field of fields) sessionStorage.removeItem(name(field));
    location.assign(next);
  } catch (error) {
    problem.textContent = error.message;
    button.disabled = false;
  }
}

button.addEventListener("click", save);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.repeat) { event.preventDefault(); save(); }
});
document.documentElement.dataset.ready = "yes";
