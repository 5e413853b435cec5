// All outputs at once: digits, arrows, buttons, or dragging. `values[i]` is the place of output i, null if it
// has none yet. As soon as every output has one, places are counted as in sports: two that share place 2 are
// followed by place 4. That is what the store keeps.
export function startRanking(task, changed) {
  const letters = "ABCDEFGHI";
  const cards = [...document.querySelectorAll("[data-output]")];
  const total = cards.length;
  const tray = document.querySelector(".tray");
  const list = document.querySelector(".places-list");
  let values = Array.from({ length: total }, (_, i) => task.start?.ranks?.[i] ?? null);
  let selected = 0;

  const placed = () => values.filter((value) => value !== null);
  const counted = (given) => given.map((value) => (value === null ? null
    : 1 + given.filter((other) => other !== null && other < value).length));
  const complete = () => values.every((value) => value !== null);
  const inPlace = (value) => values.flatMap((found, i) => (found === value ? [i] : []));

  function set(next) {
    values = next.every((value) => value !== null) ? counted(next) : next;
    draw();
    changed();
  }
  function give(output, value) {
    set(values.map((found, i) => (i === output ? value : found)));
  }
  // Puts an output between two places: those from `before` on move down.
  function insert(output, before) {
    const rest = values.map((value, i) => (i === output ? null : value));
    set(counted(rest.map((value, i) => (i === output ? 2 * before - 1 : value === null ? null : 2 * value))));
  }
  // Half a step: from a tie to alone, from alone to a tie with the neighbour.
  function step(output, by) {
    if (values[output] === null) {
      give(output, by < 0 ? Math.min(total, Math.max(0, ...placed()) + 1) : total);
      return;
    }
    const levels = [...new Set(placed())].sort((x, y) => x - y);
    const value = values[output];
    if (inPlace(value).length > 1) {
      set(counted(values.map((found, i) => (found === null ? null : 2 * found + (i === output ? by : 0)))));
      return;
    }
    const neighbour = levels[levels.indexOf(value) + by];
    if (neighbour !== undefined) set(counted(values.map((found, i) => (i === output ? neighbour : found))));
  }
  function select(output, scroll = true) {
    selected = output;
    draw();
    cards[output].focus({ preventScroll: true });
    if (scroll) cards[output].scrollIntoView({ block: "nearest" });
  }

  // --- drawing

  function chip(output) {
    const element = document.createElement("button");
    element.type = "button";
    element.className = "chip";
    element.dataset.chip = output;
    const letter = document.createElement("span");
    letter.className = "letter";
    letter.textContent = letters[output];
    const words = document.createElement("span");
    words.className = "words";
    words.textContent = cards[output].querySelector(".written").textContent.trim().slice(0, 60);
    element.append(letter, words);
    element.setAttribute("aria-label", `Output ${letters[output]}: show it`);
    if (output === selected) element.classList.add("selected");
    return element;
  }
  function gap(before) {
    const element = document.createElement("li");
    element.className = "gap";
    element.dataset.drop = "gap";
    element.dataset.value = before;
    element.setAttribute("aria-hidden", "true");
    return element;
  }
  function draw() {
    cards.forEach((card, i) => {
      const value = values[i];
      card.classList.toggle("selected", i === selected);
      card.classList.toggle("unplaced", value === null);
      const tied = value !== null && inPlace(value).length > 1;
      card.querySelector("[data-place]").textContent = value === null ? "" : tied ? `place ${value}, tied` : `place ${value}`;
      for (const button of card.querySelectorAll("[data-rank]")) {
        button.setAttribute("aria-pressed", String(Number(button.dataset.rank) === value));
      }
    });
    const open = inPlace(null);
    tray.querySelector(".chips").replaceChildren(...open.map(chip));
    tray.classList.toggle("empty", open.length === 0);
    const rows = [];
    for (let value = 1; value <= total; value += 1) {
      const here = inPlace(value);
      const row = document.createElement("li");
      row.className = "level";
      row.dataset.drop = "level";
      row.dataset.value = value;
      const number = document.createElement("span");
      number.className = "number";
      number.textContent = value;
      const chips = document.createElement("div");
      chips.className = "chips";
      chips.append(...here.map(chip));
      row.append(number, chips);
      row.classList.toggle("empty", here.length === 0);
      if (here.length > 1) {
        const tie = document.createElement("span");
        tie.className = "badge";
        tie.textContent = "tie";
        row.append(tie);
      }
      rows.push(gap(value), row);
    }
    list.replaceChildren(...rows, gap(total + 1));
    const left = open.length;
    document.getElementById("rank-note").textContent = left
      ? `${left} of ${total} still to rank` : "1 is the best. All are ranked.";
  }

  // --- dragging, by mouse, pen or finger

  let drag = null;
  const target = (event) => document.elementsFromPoint(event.clientX, event.clientY)
    .map((element) => element.closest("[data-drop]")).find(Boolean);
  function start(event) {
    if (event.button !== 0 || !(event.target instanceof Element)) return;
    const chipHit = event.target.closest("[data-chip]");
    const handle = event.target.closest(".handle");
    if (!chipHit && (!handle || event.target.closest("button"))) return;
    const output = Number(chipHit ? chipHit.dataset.chip : handle.closest("[data-output]").dataset.output);
    drag = { output, x: event.clientX, y: event.clientY, ghost: null, over: null, pointer: event.pointerId };
  }
  function move(event) {
    if (!drag || event.pointerId !== drag.pointer) return;
    if (!drag.ghost) {
      if (Math.hypot(event.clientX - drag.x, event.clientY - drag.y) < 6) return;
      drag.ghost = chip(drag.output);
      drag.ghost.classList.add("ghost");
      document.body.append(drag.ghost);
      document.body.classList.add("dragging");
    }
    event.preventDefault();
    drag.ghost.style.setProperty("transform", `translate(${event.clientX + 8}px, ${event.clientY + 8}px)`);
    const over = target(event);
    if (over !== drag.over) {
      drag.over?.classList.remove("over");
      over?.classList.add("over");
      drag.over = over;
    }
  }
  function drop(event) {
    if (!drag || event.pointerId !== drag.pointer) return;
    const { output, ghost, over } = drag;
    end();
    if (!ghost) return; // a click
    suppressClick();
    selected = output;
    if (over?.dataset.drop === "tray") give(output, null);
    else if (over?.dataset.drop === "level") give(output, Number(over.dataset.value));
    else if (over?.dataset.drop === "gap") insert(output, Number(over.dataset.value));
    else draw();
  }
  function end() {
    drag?.ghost?.remove();
    drag?.over?.classList.remove("over");
    document.body.classList.remove("dragging");
    drag = null;
  }
  function suppressClick() {
    const stop = (event) => { event.stopPropagation(); event.preventDefault(); };
    addEventListener("click", stop, { capture: true, once: true });
    setTimeout(() => removeEventListener("click", stop, { capture: true }), 0);
  }
  document.addEventListener("pointerdown", start);
  document.addEventListener("pointermove", move, { passive: false });
  document.addEventListener("pointerup", drop);
  document.addEventListener("pointercancel", end);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && drag) { end(); draw(); }
  });

  // --- buttons

  cards.forEach((card, i) => {
    card.addEventListener("focusin", () => { if (selected !== i) { selected = i; draw(); } });
    card.addEventListener("click", (event) => { if (!event.target.closest("button") && String(getSelection()) === "") select(i, false); });
    for (const button of card.querySelectorAll("[data-rank]")) {
      button.addEventListener("click", () => {
        selected = i;
        const value = Number(button.dataset.rank);
        give(i, values[i] === value ? null : value);
      });
    }
    for (const button of card.querySelectorAll("[data-move]")) {
      button.addEventListener("click", () => { selected = i; step(i, Number(button.dataset.move)); });
    }
  });
  document.querySelector(".board").addEventListener("click", (event) => {
    const hit = event.target.closest("[data-chip]");
    if (hit) select(Number(hit.dataset.chip));
  });
  const clear = () => set(values.map(() => null));
  document.getElementById("clear").addEventListener("click", clear);
  draw();

  return {
    value: () => ({ ranks: values }),
    problem: () => (complete() ? null : `Rank ${inPlace(null).map((i) => letters[i]).join(", ")} too.`),
    showProblem: () => select(inPlace(null)[0]),
    clear,
    key(name, event) {
      const letter = name.length === 1 ? letters.toLowerCase().indexOf(name) : -1;
      if (/^[1-9]$/.test(name) && Number(name) <= total) {
        give(selected, Number(name));
        const open = inPlace(null);
        if (open.length) select(open.find((i) => i > selected) ?? open[0]);
      } else if (letter >= 0 && letter < total) select(letter);
      else if (name === "ArrowUp") step(selected, -1);
      else if (name === "ArrowDown") step(selected, 1);
      else if (name === "ArrowRight") select(Math.min(selected + 1, total - 1));
      else if (name === "ArrowLeft") select(Math.max(selected - 1, 0));
      else if (name === "0" || name === "Backspace") give(selected, null);
      else return false;
      return true;
    },
  };
}
