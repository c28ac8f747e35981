// What people think of an answer, and which ratings can be trained on.

import { get, put, ratingPath, send } from "./api.js";
import { layout } from "./json.js";

export const NONE = { rating: null, note: "", correction: null };

export const load = async (id) => ({ ...NONE, ...(await get(ratingPath(id))) });

/** Store it. A right answer belongs to a bad rating only, and the given answer itself is none. */
export function save(id, { rating, note, correction }, answer) {
  const right = rating === "bad" && correction?.trim() && correction !== answer ? correction : null;
  return put(ratingPath(id), { rating, note: rating ? note : "", correction: right });
}

/** What exporting would do with this rating, in a sentence. */
export function meaning({ rating, correction }, answer) {
  if (rating === "good") return "Exported as an example of a right answer.";
  if (rating !== "bad") return "";
  if (!correction?.trim()) return "Kept as a complaint. Add the right answer to make it an example to train on.";
  if (correction === answer) return "This is still the given answer; change it into the right one.";
  if (layout(answer) && !layout(correction)) return "The answer was JSON, and this right answer is not valid JSON.";
  return "Exported with the right answer.";
}

/** Fetch the rated examples and hand them to the browser as a file; returns how many were left out. */
export async function download(which) {
  const response = await send(`/playground/api/export?rating=${which}`, { headers: { Accept: "*/*" } });
  const link = document.createElement("a");
  const text = await response.text();
  link.href = URL.createObjectURL(new Blob([text], { type: "application/x-ndjson" }));
  link.download = `examples-${which}.jsonl`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  return { rows: text.split("\n").filter(Boolean).length, leftOut: Number(response.headers.get("X-Left-Out") ?? 0) };
}
