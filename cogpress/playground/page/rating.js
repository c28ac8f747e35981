// Ratings of answers, and which of them can be trained on.

import { get, put, ratingPath, send } from "./api.js";
import { layout } from "./json.js";

export const NONE = { rating: null, note: "", correction: null };

export const load = async (id) => ({ ...NONE, ...(await get(ratingPath(id))) });

/** Save a rating. Only a bad rating has a correction, which must differ from the answer. */
export function save(id, { rating, note, correction }, answer) {
  const right = rating === "bad" && correction?.trim() && correction !== answer ? correction : null;
  return put(ratingPath(id), { rating, note: rating ? note : "", correction: right });
}

/** What the export does with this rating, in a sentence. */
export function meaning({ rating, correction }, answer) {
  if (rating === "good") return "Exported as a training example.";
  if (rating !== "bad") return "";
  if (!correction?.trim()) return "Not exported yet. Add the right answer to train on it.";
  if (correction === answer) return "This is still the model's answer. Change it to the right one.";
  if (layout(answer) && !layout(correction)) return "The model's answer is JSON, but this one is not.";
  return "Exported as a training example, with the right answer.";
}

/** Download the rated examples as a file; returns how many there are and how many were left out. */
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
