// Each output alone: overall 1 to 7, and questions that are yes, no or left open.
export function startRating(task, changed) {
  const screens = [...document.querySelectorAll("[data-output]")];
  const steps = [...document.querySelectorAll("[data-step]")];
  const rows = screens.map((screen) => [...screen.querySelectorAll("[data-key]")]);
  const ratings = screens.map((_, place) => ({
    overall: task.start?.ratings?.[place]?.overall ?? null,
    questions: { ...task.start?.ratings?.[place]?.questions },
  }));
  let shown = 0;
  let line = 0;

  function draw() {
    screens.forEach((screen, place) => {
      screen.hidden = place !== shown;
      const { overall, questions } = ratings[place];
      for (const button of screen.querySelectorAll("[data-overall]")) {
        const on = Number(button.dataset.overall) === overall;
        button.setAttribute("aria-checked", String(on));
        if (on) screen.querySelector(".overall-name").textContent = button.title;
      }
      if (overall === null) screen.querySelector(".overall-name").textContent = "";
      rows[place].forEach((row, number) => {
        row.classList.toggle("current", number === line);
        for (const button of row.querySelectorAll("[data-value]")) {
          button.setAttribute("aria-pressed", String(String(questions[row.dataset.key]) === button.dataset.value));
        }
      });
    });
    steps.forEach((step, place) => {
      step.setAttribute("aria-pressed", String(place === shown));
      step.querySelector(".state").textContent = ratings[place].overall ?? "–";
    });
  }
  function show(place) {
    const moved = place !== shown;
    shown = place;
    if (moved) { line = 0; }
    draw();
    if (moved) window.scrollTo({ top: 0 });
  }
  function rate(place, overall) {
    ratings[place].overall = overall;
    draw();
    changed();
  }
  function answer(place, key, value) {
    ratings[place].questions[key] = value;
    draw();
    changed();
  }
  function moveLine(by) {
    line = Math.max(0, Math.min(rows[shown].length - 1, line + by));
    draw();
    rows[shown][line]?.scrollIntoView({ block: "nearest" });
  }

  screens.forEach((screen, place) => {
    for (const button of screen.querySelectorAll("[data-overall]")) {
      button.addEventListener("click", () => rate(place, Number(button.dataset.overall)));
    }
    rows[place].forEach((row, number) => {
      for (const button of row.querySelectorAll("[data-value]")) {
        button.addEventListener("click", () => {
          line = number;
          const value = button.dataset.value === "true";
          const same = ratings[place].questions[row.dataset.key] === value;
          answer(place, row.dataset.key, same ? null : value); // once more: unanswered again
        });
      }
    });
  });
  steps.forEach((step, place) => step.addEventListener("click", () => show(place)));
  draw();

  const firstOpen = () => ratings.findIndex((rating) => rating.overall === null);
  return {
    value: () => ({ ratings }),
    problem: () => (firstOpen() < 0 ? null : "Give an overall rating, 1 to 7."),
    // Submitting a rated output leads to the next one that is not.
    advance() {
      const open = firstOpen();
      if (open < 0 || ratings[shown].overall === null) return false;
      show(open);
      return true;
    },
    showProblem: () => show(firstOpen()),
    clear() {
      for (const rating of ratings) { rating.overall = null; rating.questions = {}; }
      show(0);
      changed();
    },
    key(name) {
      const letter = "abcdefghi".indexOf(name);
      if (/^[1-7]$/.test(name)) rate(shown, Number(name));
      else if (letter >= 0 && letter < screens.length && name.length === 1) show(letter);
      else if (name === "ArrowDown" && rows[shown].length) moveLine(1);
      else if (name === "ArrowUp" && rows[shown].length) moveLine(-1);
      else if (name === "ArrowRight") show(Math.min(shown + 1, screens.length - 1));
      else if (name === "ArrowLeft") show(Math.max(shown - 1, 0));
      else if (["y", "n", "u"].includes(name) && rows[shown].length) {
        answer(shown, rows[shown][line].dataset.key, { y: true, n: false, u: null }[name]);
        moveLine(1);
      } else return false;
      return true;
    },
  };
}
