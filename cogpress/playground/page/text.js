// Format values for people: untrusted text, numbers, durations and times.

/** An output as one text; a language model's is a list of chunks. */
export function asText(output) {
  if (output === null || output === undefined) return "";
  if (typeof output === "string") return output;
  if (Array.isArray(output) && output.every((part) => typeof part === "string")) return output.join("");
  return JSON.stringify(output, null, 2);
}

// Control characters (including ANSI escapes), bidirectional overrides and invisible characters. A page does not
// execute them, but they can make text look like something else, so they are shown by name.
const UNSEEN =
  /[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]/g;

/** Split text into strings and {character, name} for characters that cannot be seen. */
export function visible(text) {
  const pieces = [];
  let from = 0;
  for (const { 0: character, index } of text.matchAll(UNSEEN)) {
    if (character === "\r" && text[index + 1] === "\n") continue;
    if (index > from) pieces.push(text.slice(from, index));
    pieces.push({ character, name: character === "\u001b" ? "ESC" : codePoint(character) });
    from = index + 1;
  }
  if (from < text.length) pieces.push(text.slice(from));
  return pieces;
}

const codePoint = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

/** Write these characters as escapes that Python, JavaScript and JSON string literals all understand. */
export const escapeUnseen = (text) =>
  text.replace(UNSEEN, (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`);

const STRING = /"((?:[^"\\]|\\.){8,})/;

/** An input as one line; if it is JSON, the first text in it. The preview may be cut off. */
export function headline(preview) {
  if (!preview) return "(no input)";
  const found = /^\s*[[{]/.test(preview) && STRING.exec(preview.replace(/"[^"\\]*"\s*:/g, ""));
  return found ? found[1].replace(/\\n/g, " ").replace(/\\(.)/g, "$1") : preview;
}

const grouped = new Intl.NumberFormat("en");

export const count = (number) => grouped.format(number);

/** Seconds with a useful precision: 84 ms, 1.24 s, 2 m 5 s. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "–";
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  return `${Math.floor(seconds / 60)} m ${Math.round(seconds % 60)} s`;
}

export function speed(tokensPerSecond) {
  if (!tokensPerSecond) return "–";
  return tokensPerSecond < 10 ? tokensPerSecond.toFixed(1) : count(Math.round(tokensPerSecond));
}

/** A time, relative if it is recent. */
export function when(iso, now = new Date()) {
  const then = new Date(iso);
  if (Number.isNaN(then.getTime())) return "";
  const minutes = (now - then) / 60000;
  if (minutes < 1) return "just now";
  if (minutes < 60) return `${Math.floor(minutes)} min ago`;
  const clock = then.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  if (then.toDateString() === now.toDateString()) return clock;
  const day = then.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
  return then.getFullYear() === now.getFullYear() ? `${day}, ${clock}` : `${day} ${then.getFullYear()}`;
}

/** A version's id, shortened if it is a hash. */
export const short = (id) => (/^[0-9a-f]{20,}$/.test(id ?? "") ? id.slice(0, 8) : (id ?? ""));
