// The differences between two predictions: inputs, and words in texts.

import { diffWordsWithSpace } from "./vendor/diff/diff/word.js";

// A longer comparison would freeze the page.
const LONGEST_MS = 1500;

/**
 * Two texts as parts for showing side by side: [{text, changed}] for each. `exact` is false if they were too long and
 * too different to compare word by word.
 */
export function sides(left, right) {
  const whole = (text, changed) => [{ text, changed }];
  if (left === right) return { left: whole(left, false), right: whole(right, false), exact: true };
  const parts = diffWordsWithSpace(left, right, { timeout: LONGEST_MS });
  if (!parts) return { left: whole(left, true), right: whole(right, true), exact: false };
  const of = (skip) =>
    parts
      .filter((part) => !part[skip])
      .map(({ value, added, removed }) => ({ text: value, changed: Boolean(added || removed) }));
  return { left: of("added"), right: of("removed"), exact: true };
}

const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

/** The inputs of both by name, split into differing and equal ones. */
export function inputs(left = {}, right = {}) {
  const names = [...new Set([...Object.keys(left ?? {}), ...Object.keys(right ?? {})])];
  const differing = names
    .filter((name) => !same(left?.[name], right?.[name]))
    .map((name) => ({ name, left: left?.[name], right: right?.[name] }));
  const equal = names.filter((name) => same(left?.[name], right?.[name])).map((name) => ({ name, value: left[name] }));
  return { differing, equal };
}

/** An input's value as text to compare; undefined means it was not set. */
export const inputText = (value) =>
  value === undefined ? "" : typeof value === "string" ? value : JSON.stringify(value, null, 2);
