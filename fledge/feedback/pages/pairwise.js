// A, B, tie, both bad.
export function startPairwise(task, changed) {
  let choice = task.start?.choice ?? null;
  const buttons = document.querySelectorAll(".verdict [data-choice]");
  const cards = document.querySelectorAll(".pair [data-choice]");
  const keys = { a: "a", b: "b", ArrowLeft: "a", ArrowRight: "b", t: "tie", "=": "tie", x: "both_bad" };

  function draw() {
    for (const button of buttons) button.setAttribute("aria-checked", String(button.dataset.choice === choice));
    for (const card of cards) {
      card.classList.toggle("chosen", card.dataset.choice === choice || choice === "tie");
      card.classList.toggle("rejected", choice === "both_bad");
    }
  }
  function choose(value) {
    choice = value;
    draw();
    changed();
  }
  for (const button of buttons) button.addEventListener("click", () => choose(button.dataset.choice));
  draw();
  return {
    value: () => ({ choice }),
    problem: () => (choice === null ? "Choose one first." : null),
    clear: () => choose(null),
    key(name) {
      if (!(name in keys)) return false;
      choose(keys[name]);
      return true;
    },
  };
}
