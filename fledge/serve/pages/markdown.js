// A model's output as elements. It is hostile until shown otherwise: text only ever becomes text nodes, links
// and pictures are shown with their address and lead nowhere. A subset of CommonMark with tables and
// strike-through. Every piece of text is handed on with its place in the source, so that tokens can be told.

import { DEEPEST, INDENT, inline, make } from "./inline.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const TABLE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

export function linesOf(source) {
  const lines = [];
  const ends = /\r\n|\r|\n/g;
  let start = 0;
  for (let found = ends.exec(source); found; found = ends.exec(source)) {
    lines.push({ start, end: found.index });
    start = ends.lastIndex;
  }
  lines.push({ start, end: source.length });
  return lines;
}

// The blocks of some lines: { kind, lines, start, end, ... }; blank lines between them belong to none.
export function blocksOf(source, lines) {
  const text = lines.map((line) => source.slice(line.start, line.end));
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!text[at].trim()) {
      at += 1;
      continue;
    }
    const block = special(lines, text, at) ?? paragraph(lines, text, at);
    block.start = lines[at].start;
    at = block.next;
    block.end = lines[at - 1].end;
    blocks.push(block);
  }
  return blocks;
}

function special(lines, text, at) {
  const line = text[at];
  let found = FENCE.exec(line);
  if (found) return fence(lines, text, at, found);
  found = HEADING.exec(line);
  if (found) {
    const start = lines[at].start + found[0].length;
    return { kind: "heading", level: found[1].length, lines: [{ start, end: lines[at].end }], next: at + 1 };
  }
  if (RULE.test(line)) return { kind: "rule", next: at + 1 };
  if (QUOTE.test(line)) {
    const inner = [];
    for (; at < lines.length && QUOTE.test(text[at]); at += 1) {
      inner.push({ start: lines[at].start + QUOTE.exec(text[at])[0].length, end: lines[at].end });
    }
    return { kind: "quote", lines: inner, next: at };
  }
  if (ITEM.test(line)) return list(lines, text, at);
  if (isTable(text, at)) {
    const head = at;
    at += 2;
    while (at < lines.length && text[at].trim()) at += 1;
    return { kind: "table", lines: lines.slice(head, at), next: at };
  }
  return null;
}

function fence(lines, text, at, [, mark, language]) {
  const inner = [];
  const close = new RegExp(`^ {0,3}\\${mark[0]}{${mark.length},}[ \\t]*$`);
  for (at += 1; at < lines.length; at += 1) {
    if (close.test(text[at])) {
      at += 1;
      break;
    }
    inner.push(lines[at]);
  }
  return { kind: "code", language: language.trim(), lines: inner, next: at };
}

const isTable = (text, at) => text[at].includes("|") && at + 1 < text.length && text[at + 1].length < 2000
  && text[at + 1].includes("|") && TABLE.test(text[at + 1]);

const interrupts = (text, at) => FENCE.test(text[at]) || HEADING.test(text[at]) || RULE.test(text[at])
  || QUOTE.test(text[at]) || /^ {0,3}(?:[-*+]|1[.)])[ \t]/.test(text[at]) || isTable(text, at);

function paragraph(lines, text, at) {
  const first = at;
  for (at += 1; at < lines.length && text[at].trim() && !interrupts(text, at); at += 1);
  return { kind: "paragraph", lines: lines.slice(first, at), next: at };
}

const widthOf = (space) => [...space].reduce((width, letter) => width + (letter === "\t" ? 4 : 1), 0);

function list(lines, text, at) {
  const [, , first] = ITEM.exec(text[at]);
  const ordered = first.length > 1 || /\d/.test(first);
  const sort = first.at(-1); // "-", "*", "+", "." or ")": another one begins another list
  const items = [];
  let last = at; // behind the last line that says something
  let indent = 0;
  let loose = false; // items stand apart, as paragraphs
  for (; at < lines.length; at += 1) {
    const line = text[at];
    const found = ITEM.exec(line);
    const space = widthOf(INDENT.exec(line)[0]);
    if (!line.trim()) {
      if (at - last > 1) break;
      items.at(-1).push({ start: lines[at].end, end: lines[at].end });
      continue;
    }
    if (items.length && space >= indent) { // goes on in the item
      let cut = 0;
      for (let width = 0; width < indent; cut += 1) width += line[cut] === "\t" ? 4 : 1;
      items.at(-1).push({ start: lines[at].start + cut, end: lines[at].end });
    } else if (found && found[2].at(-1) === sort && /\d/.test(found[2]) === ordered && !RULE.test(line)) {
      const gap = found[3].length > 4 ? 1 : found[3].length;
      indent = found[1].length + found[2].length + Math.max(1, gap);
      const start = Math.min(lines[at].end, lines[at].start + found[1].length + found[2].length + gap);
      loose ||= items.length > 0 && last !== at;
      items.push([{ start, end: lines[at].end }]);
    } else if (last === at && !interrupts(text, at)) { // a line that was wrapped without its indent
      items.at(-1).push(lines[at]);
    } else {
      break;
    }
    last = at + 1;
  }
  return { kind: "list", ordered, from: ordered ? Number.parseInt(first, 10) : 1, items, loose, next: last };
}

// --- elements -----------------------------------------------------------------------------------------------

// One block as an element. `paint(parent, from, to)` appends the source's characters from..to.
export function elementOf(source, block, paint, depth = 0) {
  if (block.kind === "code") return code(source, block, paint);
  if (block.kind === "rule") return make("hr");
  if (block.kind === "table") return table(source, block, paint);
  if (block.kind === "list") return listElement(source, block, paint, depth);
  if (block.kind === "quote") {
    const element = make("blockquote");
    element.append(...innerOf(source, block.lines, depth).map((part) => elementOf(source, part, paint, depth + 1)));
    return element;
  }
  const element = make("p", block.kind === "heading" ? `heading-${block.level}` : "");
  if (block.kind === "heading") {
    element.role = "heading";
    element.ariaLevel = "6";
  }
  inline(element, source, block.lines, paint, 0);
  return element;
}

// The blocks inside a quote or an item; deep inside, plain text.
const innerOf = (source, lines, depth) => (depth < DEEPEST ? blocksOf(source, lines) : [{ kind: "paragraph", lines }]);

function listElement(source, block, paint, depth) {
  const items = block.items.map((lines) => innerOf(source, lines, depth));
  const apart = (inner) => inner.some((part, i) => i
    && /\n[ \t]*\r?\n/.test(source.slice(inner[i - 1].end, part.start)));
  const loose = block.loose || items.some(apart);
  const element = make(block.ordered ? "ol" : "ul");
  if (block.ordered && block.from !== 1) element.start = block.from;
  for (const inner of items) {
    const item = make("li");
    for (const part of inner) {
      if (part.kind === "paragraph" && !loose) inline(item, source, part.lines, paint, 0);
      else item.append(elementOf(source, part, paint, depth + 1));
    }
    element.append(item);
  }
  return element;
}

function code(source, block, paint) {
  const element = make("div", "code");
  if (block.language) {
    const label = make("span", "language");
    label.textContent = block.language;
    element.append(label);
  }
  const body = make("code");
  for (const line of block.lines) {
    paint(body, line.start, line.end);
    body.append("\n");
  }
  const pre = make("pre");
  pre.tabIndex = 0; // a wide one is scrolled by keys
  pre.append(body);
  element.append(pre);
  return element;
}

function table(source, block, paint) {
  const sides = cellsOf(source, block.lines[1]).map(({ start, end }) => {
    const mark = source.slice(start, end);
    if (mark.endsWith(":")) return mark.startsWith(":") ? "center" : "right";
    return "";
  });
  const row = (line, tag) => {
    const cells = cellsOf(source, line);
    const element = make("tr");
    for (let i = 0; i < Math.max(sides.length, cells.length); i += 1) {
      const cell = make(tag, sides[i]);
      if (cells[i]) inline(cell, source, [cells[i]], paint, 0);
      element.append(cell);
    }
    return element;
  };
  const element = make("table");
  const head = make("thead");
  const body = make("tbody");
  head.append(row(block.lines[0], "th"));
  body.append(...block.lines.slice(2).map((line) => row(line, "td")));
  element.append(head, body);
  return element;
}

function cellsOf(source, line) {
  const cells = [];
  let start = line.start;
  const push = (end) => {
    let from = start;
    while (from < end && /\s/.test(source[from])) from += 1;
    let to = end;
    while (to > from && /\s/.test(source[to - 1])) to -= 1;
    cells.push({ start: from, end: to });
  };
  for (let at = line.start; at < line.end; at += 1) {
    if (source[at] === "\\") {
      at += 1;
    } else if (source[at] === "|") {
      push(at);
      start = at + 1;
    }
  }
  push(line.end);
  if (cells.length && cells[0].start === cells[0].end) cells.shift(); // before a line's first bar
  if (cells.length && cells.at(-1).start === cells.at(-1).end) cells.pop();
  return cells;
}
