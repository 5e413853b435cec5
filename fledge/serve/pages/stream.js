// Requests to the server: JSON, and streams of events; every failure becomes one line.
const KEY = "fledge-key";

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

// What went wrong, in one line; `status` is HTTP's (0: nobody answered).
export class Refused extends Error {
  constructor(line, status = 0) {
    super(line);
    this.status = status;
  }
}

const LOST = "The connection to the server was lost.";

async function request(path, body, signal) {
  const headers = {};
  if (body !== undefined) headers["content-type"] = "application/json";
  if (apiKey.get()) headers.authorization = `Bearer ${apiKey.get()}`;
  let answer;
  try {
    answer = await fetch(path, {
      method: body === undefined ? "GET" : "POST", headers, signal,
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("No connection to the server.");
  }
  if (answer.ok) return answer;
  let said = null;
  try { said = messageOf(await answer.json()); } catch { /* the line below says what happened */ }
  throw new Refused(lineOf(answer, said), answer.status);
}

function messageOf(value) {
  const said = value?.error?.message ?? value?.error ?? value?.detail;
  return typeof said === "string" ? said : null;
}

function lineOf(answer, said) {
  const told = said ?? `The server answered ${answer.status}.`;
  if (answer.status === 401) return `The server wants a key: ${told}`;
  if (answer.status !== 429) return told;
  const seconds = Number(answer.headers.get("retry-after"));
  const end = /[.!?]$/.test(told) ? "" : ".";
  return `The server is busy: ${told}${end}${seconds > 0 ? ` Try again in ${seconds} s.` : ""}`;
}

export const getJson = async (path) => (await request(path)).json();
export const postJson = async (path, body) => (await request(path, body)).json();

// Sends a request for a stream and hands on every event's object. Resolves when the server has said that it
// is done; throws Refused for an error, also one in mid-stream, and AbortError.
export async function streamEvents(path, body, signal, take) {
  const answer = await request(path, body, signal);
  let done = false;
  let buffer = "";
  const handle = (event) => {
    const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart()).join("\n");
    if (!data || done) return;
    if (data === "[DONE]") {
      done = true;
      return;
    }
    let value;
    try { value = JSON.parse(data); } catch { throw new Refused("The server sent something that is no JSON."); }
    if (value.error) throw new Refused(messageOf(value) ?? "The server stopped with an error.", value.error.code | 0);
    take(value);
  };
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    while (!done) {
      const { value, done: ended } = await reader.read();
      if (ended) break;
      const events = (buffer + value).replace(/\r\n/g, "\n").split("\n\n");
      buffer = events.pop();
      events.forEach(handle);
    }
    handle(buffer);
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Refused) throw error;
    throw new Refused(LOST);
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!done) throw new Refused(LOST);
}
