// The histogram: what the model expected in a token's place. Shown under the pointer, for a tap, and by the arrow
// keys in an answer; a candidate that is chosen starts another answer from there.
import { appendText, bitsOf, labelOf, share } from "./tokens.js";
import { make } from "./answer.js";

const card = document.getElementById("card");
const said = document.getElementById("said"); // for those who hear the page
let current = null; // { body, index, pinned, token }
const STEERING = /^<\|[\w-]+\|>$|^<s>$/;
let chosen = -1; // the row that the arrow keys are at
let timer = 0;

// `branch(slot, part, index, candidate)` starts the new answer; `busy(slot)` says whether one is being written.
export function startCandidates(turns, { branch, busy }) {
  const place = (target) => {
    const token = target instanceof Element ? target.closest(".token") : null;
    return token && { body: token.closest(".body"), index: Number(token.dataset.token), token };
  };
  turns.addEventListener("pointerover", (event) => {
    const at = place(event.target);
    if (!at || event.pointerType !== "mouse" || event.buttons || current?.pinned) return;
    clearTimeout(timer);
    timer = setTimeout(() => show(at, false), current ? 30 : 120);
  });
  turns.addEventListener("pointerout", (event) => {
    if (event.pointerType === "mouse" && place(event.target)) leave();
  });
  card.addEventListener("pointerenter", () => clearTimeout(timer));
  card.addEventListener("pointerleave", leave);
  card.addEventListener("mousedown", (event) => event.preventDefault()); // the answer keeps the focus, and so the arrow keys
  turns.addEventListener("click", (event) => {
    const at = place(event.target);
    if (at && getSelection().isCollapsed) show(at, true);
  });
  document.addEventListener("pointerdown", (event) => {
    if (current && !card.contains(event.target) && !place(event.target)) hideCard();
  });
  turns.addEventListener("keydown", (event) => {
    const body = event.target;
    if (!body.classList?.contains("body") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (byKey(body, event.key)) event.preventDefault();
  });
  addEventListener("scroll", () => {
    if (current?.token.isConnected && !isNarrow()) put(current.token);
  }, { passive: true });
  turns.addEventListener("focusout", (event) => {
    if (current?.body === event.target && !card.contains(event.relatedTarget)) hideCard();
  });

  function leave() {
    clearTimeout(timer);
    if (!current?.pinned) timer = setTimeout(hideCard, 250);
  }

  function byKey(body, key) {
    const open = current?.body === body && current.pinned;
    if (key === "ArrowLeft" || key === "ArrowRight" || (open && (key === "Home" || key === "End"))) {
      const tokens = [...body.querySelectorAll(".token")];
      if (!tokens.length) return false;
      const last = tokens.length - 1;
      const index = open ? current.index : null;
      let to = key === "ArrowRight" || key === "Home" ? 0 : last;
      if (index !== null && key === "ArrowRight") to = tokens.findIndex((one) => Number(one.dataset.token) > index);
      if (index !== null && key === "ArrowLeft") to = tokens.findLastIndex((one) => Number(one.dataset.token) < index);
      if (to >= 0) show({ body, index: Number(tokens[to].dataset.token), token: tokens[to] }, true);
      return true;
    }
    if (!open) return false;
    const rows = [...card.querySelectorAll("button.bar:not(:disabled)")];
    if ((key === "ArrowDown" || key === "ArrowUp") && rows.length) {
      chosen = (chosen + (key === "ArrowDown" ? 1 : chosen < 0 ? 0 : -1) + rows.length) % rows.length;
      rows.forEach((row, number) => row.classList.toggle("chosen", number === chosen));
      rows[chosen].scrollIntoView({ block: "nearest" });
      said.textContent = rows[chosen].ariaLabel;
      return true;
    }
    if (key === "Enter" && rows[chosen]) {
      rows[chosen].click();
      return true;
    }
    return false;
  }

  function show({ body, index, token }, pinned) {
    clearTimeout(timer);
    mark(null);
    chosen = -1;
    current = { body, index, pinned, token };
    fill();
    mark(current);
    card.hidden = false;
    card.classList.toggle("pinned", pinned);
    if (pinned) token.scrollIntoView({ block: "nearest" });
    put(token);
  }

  function fill() {
    const { slot, part } = current.body.answer;
    const token = part.tokens[current.index];
    const candidates = token.c.some((one) => same(one, token)) ? token.c : [...token.c, token];
    const rank = token.c.findIndex((one) => same(one, token));
    const head = make("p", "head");
    const name = make("b");
    name.dir = "ltr";
    appendText(name, labelOf(token));
    const rest = 1 - candidates.reduce((sum, one) => sum + Math.exp(one.l), 0);
    head.append(name, make("span", "", `probability ${share(token.l)}`));
    if (rank >= 0) head.append(make("span", "", `rank ${rank + 1}`));
    head.append(make("span", "", `${bitsOf(token).toFixed(2)} bits`));
    const why = obstacle(slot, part, current.index);
    const rows = candidates.map((one) => bar(one, same(one, token), why ?? unfit(one), () => choose(slot, part, one)));
    if (rest > 0.0005) rows.push(rowOf("all others", Math.log(rest), "div", "rest"));
    const close = make("button", "quiet close", "×");
    close.type = "button";
    close.ariaLabel = "Close";
    close.addEventListener("click", () => { const { body } = current; hideCard(); body.focus(); });
    card.replaceChildren(close, head, make("div", "bars", ...rows),
      make("p", "small muted foot", why ?? "Choose one to write on from there; this answer stays."));
    said.textContent = current.pinned ? `${labelOf(token)}, ${share(token.l)}` : "";
  }

  function choose(slot, part, candidate) {
    const { body, index } = current;
    hideCard();
    body.focus();
    branch(slot, part, index, candidate);
  }

  // Why nothing can be branched from here, or null.
  function obstacle(slot, part, index) {
    const token = part.tokens[index];
    if (busy(slot)) return "The answer is being written.";
    if (token.m) return "A character’s later bytes: branch where it begins.";
    if (current.body.answer.places[index] === null && !token.x) return "Not part of the text: nothing can be branched from here.";
    return null;
  }
}

const same = (one, other) => (one.b || other.b ? String(one.b) === String(other.b) : one.t === other.t && one.x === other.x);

// Why a candidate can't be taken, or null. Servers give steering tokens the bytes of their names: one that ends
// the answer ends it, any other would arrive as plain text.
function unfit({ t, b, x }) {
  if (b) return "Part of a character: it can’t be sent as text.";
  return !x && STEERING.test(t) ? "A token that steers the model: it can’t be sent as text." : null;
}

function rowOf(label, logp, tag, name) {
  const row = make(tag, `bar ${name}`);
  const words = make("span", "name");
  words.dir = "ltr";
  appendText(words, label);
  const fill = make("span", "fill");
  fill.style.width = `${(100 * Math.min(1, Math.exp(logp))).toFixed(1)}%`;
  row.append(words, make("span", "track", fill), make("span", "value", share(logp)));
  return row;
}

function bar(candidate, came, obstacle, act) {
  const label = labelOf(candidate);
  const row = rowOf(label, candidate.l, "button", came ? "came" : "");
  row.type = "button";
  row.disabled = obstacle !== null;
  row.title = obstacle ?? (candidate.x ? "End the answer here" : "Write on from here with this token");
  row.ariaLabel = `${label}, ${share(candidate.l)}${came ? ", the one that came" : ""}`;
  row.addEventListener("click", act);
  return row;
}

function mark(place) {
  for (const one of document.querySelectorAll(".token.current")) one.classList.remove("current");
  if (!place) return;
  for (const one of place.body.querySelectorAll(`.token[data-token="${place.index}"]`)) one.classList.add("current");
}

const isNarrow = () => matchMedia("(max-width: 760px)").matches;

// Under the token, or above it where there is no room; the style sheet puts it at the bottom of a phone, and
// there the page goes up until the token is seen.
function put(token) {
  const rect = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = card;
  if (isNarrow()) {
    const hidden = token.getBoundingClientRect().bottom + 8 - (innerHeight - height);
    if (hidden > 0) {
      document.body.style.paddingBottom = `${height}px`; // so that there is room to go up
      scrollBy({ top: hidden });
    }
    return;
  }
  const below = rect.bottom + 6 + height <= innerHeight - 8;
  const top = below ? rect.bottom + 6 : Math.max(8, rect.top - 6 - height);
  card.style.left = `${Math.max(8, Math.min(rect.left - 12, innerWidth - width - 8))}px`;
  card.style.top = `${top}px`;
}

export function hideCard() {
  clearTimeout(timer);
  if (!current) return false;
  mark(null);
  current = null;
  card.hidden = true;
  document.body.style.paddingBottom = "";
  return true;
}
