// Tokens as a server's log-probabilities tell of them, and text drawn so that each of its tokens is known.
//
// A token: { t: text, l: log-probability (nats), c: candidates }, and where it is so: b: its bytes, which are no
// whole characters; m: 1, it begins inside a character; x: 1, it has no text (the end of the answer).
// A candidate: { t, l, b, x }.
import { blocksOf, elementOf, linesOf } from "./markdown.js";

const LONGEST_MARKDOWN = 50_000; // longer answers are shown as they were written, as on the server's pages
const PIECE = 2000; // characters of a plain text that are drawn again together
const FULL_TINT_BITS = 10; // one chance in about a thousand

// Control characters, half surrogates, invisible spaces and joiners, marks that turn the direction of text
// around, and "tag" characters, in which whole messages can be hidden. U+200C and U+200D are spared: Persian,
// Hindi and emoji need them.
const HIDDEN = /[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\u{e0000}-\u{e007f}]/gu;
const codePoint = (letter) => `U+${letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

// What ends an answer, as the model families name it: servers give such tokens the bytes of their names.
const END = /^(?:<\|(?:im_end|endoftext|end_of_text|eot_id|eom_id|end|eos)\|>|<end_of_turn>|<\/s>)$/;

// Appends text; hidden characters are shown by their number.
export function appendText(parent, text) {
  let from = 0;
  for (const found of text.matchAll(HIDDEN)) {
    if (found.index > from) parent.append(text.slice(from, found.index));
    const mark = document.createElement("span");
    mark.className = "unseen";
    mark.textContent = codePoint(found[0]);
    parent.append(mark);
    from = found.index + found[0].length;
  }
  if (from < text.length) parent.append(text.slice(from));
}

// A token or candidate so that all of it is seen: ␣ a space, ↵ a line break, \xe2 a byte that is no character.
export function labelOf({ t, b }) {
  if (b) return b.map((byte) => (byte > 32 && byte < 127
    ? String.fromCharCode(byte) : `\\x${byte.toString(16).padStart(2, "0")}`)).join("");
  return t.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍")
    .replace(HIDDEN, (letter) => `<${codePoint(letter)}>`) || "∅";
}

export function share(logp) {
  const probability = Math.min(1, Math.exp(logp));
  if (probability < 0.0001) return probability.toExponential(0);
  return `${(100 * probability).toFixed(probability < 0.01 ? 2 : 1)}%`;
}

export const bitsOf = (token) => Math.max(0, -token.l / Math.LN2);

// Reads the tokens of one answer one after the other: bytes become text where a character is whole.
export function tokenReader() {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  let missing = 0; // bytes that the last character still lacks

  return (entry) => {
    const token = { ...readOne(entry), c: (entry.top_logprobs ?? []).map(readOne) };
    if (token.x) return token;
    if (missing && (entry.bytes?.[0] & 0xc0) === 0x80) token.m = 1;
    if (entry.bytes) {
      token.t = decoder.decode(new Uint8Array(entry.bytes), { stream: true });
      for (const byte of entry.bytes) {
        if (missing && (byte & 0xc0) === 0x80) missing -= 1;
        else missing = byte >= 0xf0 ? 3 : byte >= 0xe0 ? 2 : byte >= 0xc0 ? 1 : 0;
      }
    }
    return token;
  };
}

function readOne({ token, logprob, bytes }) {
  const read = { t: token ?? "", l: Math.round(logprob * 1e4) / 1e4 };
  if (bytes === null || bytes?.length === 0 || END.test(read.t)) return { ...read, x: 1 };
  if (!bytes) return read;
  const text = wholeText(bytes);
  return text === null ? { ...read, b: bytes } : { ...read, t: text };
}

function wholeText(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(bytes));
  } catch {
    return null;
  }
}

// Where each token begins in the text; null for one whose text is not in it (a tool call's, a special token).
export function placesOf(source, tokens) {
  let at = 0;
  return tokens.map((token) => {
    if (token.x || !token.t) return null;
    const near = source.slice(at, at + token.t.length + 20).indexOf(token.t);
    if (near < 0) return null;
    const start = at + near;
    at = start + token.t.length;
    return start;
  });
}

// --- drawing ------------------------------------------------------------------------------------------------

// Draws a text with its tokens into `body`; blocks that stand there unchanged are left alone.
export function drawText(body, source, tokens, places, asWritten) {
  const plain = asWritten || source.length > LONGEST_MARKDOWN;
  const owner = new Int32Array(source.length).fill(-1);
  const loose = []; // tokens that are not in the text, and where they would stand
  let end = 0;
  tokens.forEach((token, index) => {
    if (places[index] === null) {
      loose.push({ index, at: end });
    } else {
      end = places[index] + token.t.length;
      owner.fill(index, places[index], end);
    }
  });
  body.className = plain ? "body plain" : "body markdown";
  const paint = painter(source, tokens, owner);
  const blocks = plain ? pieces(source, owner) : blocksOf(source, linesOf(source));
  const lastPiece = blocks.at(-1);
  const drawn = blocks.map((block) => {
    const mine = plain ? loose.filter(({ at }) => (at >= block.start && at < block.end)
      || (block === lastPiece && at >= block.end)) : [];
    const known = owner[block.end - 1] ?? -1;
    const key = [plain, block.kind, known, mine.map(({ index }) => index), source.slice(block.start, block.end)].join("\n");
    return { key, make: () => (plain ? written(block, mine, tokens, paint) : elementOf(source, block, paint)) };
  });
  replace(body, drawn);
}

function replace(body, drawn) {
  let same = 0;
  while (same < drawn.length && body.children[same]?.blockKey === drawn[same].key) same += 1;
  while (body.childNodes.length > same) body.lastChild.remove();
  for (const { key, make } of drawn.slice(same)) {
    const element = make();
    element.blockKey = key;
    body.append(element);
  }
}

// A plain text in pieces that end between tokens.
function pieces(source, owner) {
  const made = [];
  let start = 0;
  while (start < source.length || !made.length) {
    let end = Math.min(source.length, start + PIECE);
    while (end < source.length && (owner[end] === owner[end - 1] ? owner[end] >= 0 || isLow(source, end) : false)) end += 1;
    made.push({ start, end });
    start = end;
  }
  return made;
}

const isLow = (source, at) => source.charCodeAt(at) >= 0xdc00 && source.charCodeAt(at) < 0xe000;

function written(block, loose, tokens, paint) {
  const element = document.createElement("span");
  let from = block.start;
  for (const { index, at } of loose) {
    paint(element, from, Math.min(at, block.end), true);
    from = Math.max(from, Math.min(at, block.end));
    const chip = tokenSpan(tokens[index], index);
    chip.classList.add("loose");
    chip.textContent = labelOf(tokens[index]);
    element.append(chip);
  }
  paint(element, from, block.end, true);
  return element;
}

function tokenSpan(token, index) {
  const span = document.createElement("span");
  span.className = "token";
  span.dataset.token = index;
  span.style.setProperty("--t", Math.min(1, bitsOf(token) / FULL_TINT_BITS).toFixed(3));
  return span;
}

function painter(source, tokens, owner) {
  return (parent, from, to, marked = false) => {
    while (from < to) {
      let end = from + 1;
      while (end < to && owner[end] === owner[from]) end += 1;
      const text = source.slice(from, end);
      if (owner[from] < 0) {
        appendText(parent, text);
      } else {
        const span = tokenSpan(tokens[owner[from]], owner[from]);
        if (marked && text.includes("\n")) span.classList.add("breaks"); // a line break would be nowhere to point at
        appendText(span, text);
        parent.append(span);
      }
      from = end;
    }
  };
}
