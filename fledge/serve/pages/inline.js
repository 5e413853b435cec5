// The inside of a paragraph: emphasis, code, links. See markdown.js.

export const DEEPEST = 8; // elements within each other
export const INDENT = /^[ \t]*/;
const LONGEST = 20_000; // a longer paragraph is shown as it stands

export function make(tag, name) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  return element;
}

const MARKS = { "*": ["em", "strong"], _: ["em", "strong"], "~": [null, "s"] };
const LINK = /!?\[((?:[^[\]\\]|\\.){0,1000})\]\(((?:[^()\s\\]|\\.|\([^()\s]*\)){0,2000})(?:[ \n]+"([^"]{0,300})")?\)/y;
const isWord = (letter) => letter !== undefined && /[\p{L}\p{N}]/u.test(letter);
const isSpace = (letter) => letter === undefined || /\s/.test(letter);

// Appends what some lines say to `parent`; `paint` as in elementOf.
export function inline(parent, source, lines, paint, depth) {
  let text = "";
  const places = []; // of each character of `text` in the source
  lines.forEach((line, number) => {
    if (number) {
      text += "\n";
      places.push(lines[number - 1].end);
    }
    const start = Math.min(line.end, line.start + INDENT.exec(source.slice(line.start, line.end))[0].length);
    text += source.slice(start, line.end);
    for (let at = start; at < line.end; at += 1) places.push(at);
  });
  spans(parent, text, places, paint, depth);
}

// Text with emphasis, code and links; marks that nothing closes are put back as text.
function spans(root, text, places, paint, depth) {
  const open = []; // { mark, size, element, at }
  const unclosed = new Map(); // runs of so many backticks that nothing closes
  let parent = root;
  let from = 0;

  const put = (to) => {
    while (from < to) {
      if (text[from] === "\n") {
        parent.append(make("br"));
        from += 1;
        continue;
      }
      let end = from + 1;
      while (end < to && text[end] !== "\n" && places[end] === places[end - 1] + 1) end += 1;
      paint(parent, places[from], places[end - 1] + 1);
      from = end;
    }
  };
  const unwrap = ({ element, size, at }) => {
    const mark = make("span");
    paint(mark, places[at], places[at + size - 1] + 1);
    element.replaceWith(...mark.childNodes, ...element.childNodes);
  };
  const close = (place) => {
    while (open.length > place + 1) unwrap(open.pop());
    const [{ element }] = open.splice(place);
    parent = element.parentNode;
  };

  if (text.length > LONGEST) {
    put(text.length);
    return;
  }
  for (let at = 0; at < text.length;) {
    const letter = text[at];
    if (letter === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      put(at);
      from = at + 1; // the backslash is left out
      at += 2;
    } else if (letter === "`") {
      let size = 1;
      while (text[at + size] === "`") size += 1;
      const end = unclosed.get(size) ? -1 : closing(text, at + size, size);
      if (end < 0) {
        unclosed.set(size, true);
        at += size;
        continue;
      }
      put(at);
      const outer = parent;
      parent = make("code");
      outer.append(parent);
      from = at + size;
      put(end);
      parent = outer;
      from = at = end + size;
    } else if ((letter === "[" || (letter === "!" && text[at + 1] === "[")) && depth < 2) {
      LINK.lastIndex = at;
      const found = LINK.exec(text);
      if (!found) {
        at += 1;
        continue;
      }
      put(at);
      parent.append(link(text, places, at, found, paint, depth));
      from = at = LINK.lastIndex;
    } else if (letter in MARKS) {
      let size = 1;
      while (text[at + size] === letter) size += 1;
      put(at);
      at = emphasis(letter, at, size);
    } else {
      at += 1;
    }
  }
  put(text.length);
  while (open.length) unwrap(open.pop());

  // What a run of marks closes and opens; returns where reading goes on.
  function emphasis(letter, at, size) {
    const before = text[at - 1];
    const after = text[at + size];
    const end = at + size;
    const closes = !isSpace(before) && (letter !== "_" || !isWord(after));
    const opens = !isSpace(after) && (letter !== "_" || !isWord(before));
    let left = size;
    while (closes && left) {
      const place = open.findLastIndex((one) => one.mark === letter && one.size <= left);
      if (place < 0 || open[place].at + open[place].size === at) break; // nothing stands between
      left -= open[place].size;
      close(place);
      from = end - left;
    }
    while (opens && left && open.length < DEEPEST) {
      const amount = left === 3 ? 1 : Math.min(left, 2); // ***: <em><strong>, as CommonMark has it
      const tag = MARKS[letter][amount - 1];
      if (!tag || left > 3) break;
      const element = make(tag);
      parent.append(element);
      open.push({ mark: letter, size: amount, element, at: end - left });
      parent = element;
      left -= amount;
      from = end - left;
    }
    put(end);
    return end;
  }
}

function closing(text, from, size) {
  for (let at = text.indexOf("`", from); at >= 0; at = text.indexOf("`", at)) {
    let run = 1;
    while (text[at + run] === "`") run += 1;
    if (run === size) return at;
    at += run;
  }
  return -1;
}

// The text of a link and where it leads, in words: nobody reads an output to be sent away by it.
function link(text, places, at, [whole, label, address, title], paint, depth) {
  const element = make("span");
  const words = make("span", "link");
  const start = at + whole.indexOf("[") + 1;
  const part = (from, to, into) => spans(into, text.slice(from, to), places.slice(from, to), paint, depth + 1);
  const where = make("span", "address");
  const begin = start + label.length + 2;
  if (whole.startsWith("!")) {
    where.append("[picture: ");
    part(start, start + label.length, where);
    where.append("] ");
  } else {
    part(start, start + label.length, words);
    element.append(words);
    if (label === address && !title) return element;
    where.append(" ");
  }
  where.append("(");
  for (let i = begin, end = at + whole.length - 1; i < end;) { // plainly: an address has no emphasis
    if (text[i] === "\n") {
      where.append(" ");
      i += 1;
      continue;
    }
    let to = i + 1;
    while (to < end && text[to] !== "\n" && places[to] === places[to - 1] + 1) to += 1;
    paint(where, places[i], places[to - 1] + 1);
    i = to;
  }
  where.append(")");
  element.append(where);
  return element;
}
