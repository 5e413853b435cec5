// What all pages need: requests, keys that click once, and waiting.

// Sends JSON, gives back JSON; throws Error with the server's own line, or with `lost` set when nobody answered.
export async function send(path, body, options = {}) {
  let answer;
  try {
    answer = await fetch(path, {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), ...options,
    });
  } catch {
    throw Object.assign(new Error("No connection to the server."), { lost: true });
  }
  let value = {};
  try { value = await answer.json(); } catch { /* the line below says what happened */ }
  if (answer.ok) return value;
  throw Object.assign(new Error(value.error || `The server answered ${answer.status}.`), { lost: answer.status >= 502 });
}

// A text that nobody else makes up: the server takes the same one only once.
export function newKey() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export const wait = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

export const isField = (target) => target instanceof HTMLElement
  && (target.matches("textarea, select, input") || target.isContentEditable);

// Seconds in which somebody was at work here: the page in view, and a key or pointer within the last minute.
export function stopwatch(start, show) {
  let seconds = start;
  let last = performance.now();
  let active = last;
  for (const kind of ["pointermove", "pointerdown", "keydown", "scroll", "focus"]) {
    addEventListener(kind, () => { active = performance.now(); }, { passive: true, capture: true });
  }
  const count = () => {
    const now = performance.now();
    if (!document.hidden && now - active < 60_000) seconds += Math.min(now - last, 2000) / 1000;
    last = now;
    show(seconds);
    return seconds;
  };
  setInterval(count, 1000);
  return count;
}

export function clock(seconds) {
  const whole = Math.floor(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}
