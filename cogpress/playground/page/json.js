// Check and format JSON as text. JSON.parse would lose spellings (9223372036854775807, 1.0), and its errors differ
// between browsers.

const MAX_DEPTH = 200; // answers are untrusted: a million brackets must not exhaust the stack

/** A syntax error with its 1-based line and column. */
export class JsonProblem extends Error {
  constructor(message, text, offset) {
    const before = text.slice(0, offset);
    const line = before.split("\n").length;
    const column = offset - before.lastIndexOf("\n");
    super(message);
    Object.assign(this, { offset, line, column });
  }
}

const STRING = /"(?:[^"\\\u0000-\u001f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"/y;
const NUMBER = /-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?/y;
const WORD = /true|false|null/y;
const SPACE = /[ \t\r\n]*/y;

/** Parse into a tree whose leaves keep their spelling. Throws JsonProblem. */
export function parse(text) {
  let at = 0;

  const fail = (message, offset = at) => {
    throw new JsonProblem(message, text, offset);
  };
  const match = (pattern) => {
    pattern.lastIndex = at;
    const found = pattern.exec(text);
    if (found) at = pattern.lastIndex;
    return found?.[0];
  };
  const seen = () => {
    if (at >= text.length) return "the text ends here";
    const word = /[^\s,:\]}]{1,20}/y;
    word.lastIndex = at;
    return `found ${word.exec(text)?.[0] ?? text[at]}`;
  };

  function string(what) {
    const raw = match(STRING);
    if (raw !== undefined) return raw;
    if (text[at] !== '"') fail(text[at] === "'" ? "use double quotes" : `expected ${what}; ${seen()}`);
    // Find the character that makes the string invalid.
    for (let i = at + 1; i < text.length; i++) {
      if (text[i] === "\\") {
        if (!/^\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})/.test(text.slice(i, i + 6))) fail("not a valid escape", i);
        i++;
      } else if (text[i] < " ") fail("write a line break in a string as \\n, a tab as \\t", i);
    }
    return fail("this string has no closing quote");
  }

  function list(close, item, what) {
    const items = [];
    const open = at++;
    match(SPACE);
    if (text[at] === close) return at++, items;
    for (;;) {
      match(SPACE);
      if (items.length && text[at] === close) fail(`no comma before ${close}`, text.lastIndexOf(",", at));
      items.push(item());
      match(SPACE);
      if (text[at] === close) return at++, items;
      if (at >= text.length) fail(`this ${text[open]} is never closed`, open);
      if (text[at] !== ",") fail(`expected a comma or ${close} after ${what}; ${seen()}`);
      at++;
    }
  }

  function value(depth) {
    if (depth > MAX_DEPTH) fail("nested too deeply");
    match(SPACE);
    if (text[at] === "{") {
      const member = () => {
        const key = string("a name in double quotes");
        match(SPACE);
        if (text[at] !== ":") fail(`expected : after the name; ${seen()}`);
        at++;
        return [key, value(depth + 1)];
      };
      return { kind: "object", members: list("}", member, "the value") };
    }
    if (text[at] === "[") return { kind: "array", items: list("]", () => value(depth + 1), "the item") };
    if (text[at] === '"' || text[at] === "'") return { kind: "string", raw: string("a value") };
    const number = match(NUMBER);
    if (number !== undefined) return { kind: "number", raw: number };
    const word = match(WORD);
    if (word !== undefined) return { kind: "word", raw: word };
    return fail(`expected a value; ${seen()}`);
  }

  const tree = value(0);
  match(SPACE);
  if (at < text.length) fail(`nothing may follow the JSON; ${seen()}`);
  return tree;
}

/** The problem with a text that must be JSON, or null. `wanted` is "any", "list" or "object". */
export function problem(text, wanted = "any") {
  let tree;
  try {
    tree = parse(text);
  } catch (error) {
    if (error instanceof JsonProblem) return error;
    throw error;
  }
  const start = text.search(/\S/);
  if (wanted === "list" && tree.kind !== "array") return new JsonProblem("must be a list: [ … ]", text, start);
  if (wanted === "object" && tree.kind !== "object") return new JsonProblem("must be an object: { … }", text, start);
  return null;
}

/**
 * Format an object or list as [kind, text] pairs for highlighting; null for anything else. What fits in `line`
 * characters stays on one line, so that a list of small objects reads as a table.
 */
export function layout(text, line = 76) {
  if (!/^\s*[[{]/.test(text)) return null;
  let tree;
  try {
    tree = parse(text);
  } catch {
    return null;
  }
  const out = [];
  const width = (node) => {
    if (node.width === undefined) {
      if (node.kind === "object") node.width = 2 + node.members.reduce((n, [k, v]) => n + k.length + width(v) + 4, 0);
      else if (node.kind === "array") node.width = 2 + node.items.reduce((n, item) => n + width(item) + 2, 0);
      else node.width = node.raw.length;
    }
    return node.width;
  };
  const write = (node, indent, taken) => {
    if (node.kind !== "object" && node.kind !== "array") return out.push([node.kind, node.raw]);
    const [open, close] = node.kind === "object" ? "{}" : "[]";
    const items = node.kind === "object" ? node.members : node.items.map((item) => [null, item]);
    const inline = items.length === 0 || (indent > 0 && indent + taken + width(node) <= line);
    out.push(["mark", open]);
    items.forEach(([key, item], index) => {
      out.push(["space", inline ? (index ? " " : "") : "\n" + " ".repeat(indent + 2)]);
      if (key !== null) out.push(["key", key], ["mark", ": "]);
      write(item, inline ? indent : indent + 2, key === null ? 0 : key.length + 2);
      if (index < items.length - 1) out.push(["mark", ","]);
    });
    if (!inline) out.push(["space", "\n" + " ".repeat(indent)]);
    return out.push(["mark", close]);
  };
  write(tree, 0, 0);
  return out;
}

/** The formatted text; anything but an object or list stays as it is. */
export function pretty(text, line) {
  return layout(text, line)?.map(([, part]) => part).join("") ?? text;
}
