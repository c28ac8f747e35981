// Rate an answer, with a note and the right answer.

import { useEffect, useState } from "../vendor/hooks.js";
import { html } from "../html.js";
import { load, meaning, NONE, save } from "../rating.js";
import { announcement } from "../workbench.js";

export function Rating({ id, answer }) {
  const [given, setGiven] = useState(NONE);
  const [state, setState] = useState("");
  useEffect(() => {
    // A prediction that was deleted meanwhile cannot be rated but still be read.
    load(id).then((before) => setGiven({ ...before, note: before.note ?? "" }), () => {});
  }, [id]);
  const store = async (next) => {
    setGiven(next);
    setState("Saving…");
    try {
      await save(id, next, answer);
      setState("Saved");
      announcement.value = "Rating saved.";
    } catch (error) {
      setState(error.message);
    }
  };
  const toggle = (rating) => store({ ...given, rating: given.rating === rating ? null : rating });
  const edit = (name) => (event) => {
    setGiven({ ...given, [name]: event.currentTarget.value });
    setState("");
  };
  const button = (rating, label) =>
    html`<button type="button" class="button rate" data-rating=${rating} aria-pressed=${String(given.rating === rating)}
      onClick=${() => toggle(rating)}>${label}</button>`;
  return html`
    <section class="rating" aria-label="Rating">
      <div class="rating-row">
        <span class="rating-question">Is this answer right?</span>
        ${button("good", "Good")} ${button("bad", "Bad")}
        <span class="rating-state" role="status">${state}</span>
      </div>
      ${given.rating && html`<form class="rating-more" onSubmit=${(event) => (event.preventDefault(), store(given))}
        onKeyDown=${(event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && store(given)}>
        <label for=${`note-${id}`}>Note</label>
        <input id=${`note-${id}`} type="text" dir="auto" value=${given.note} onInput=${edit("note")}
          placeholder="What is right or wrong about it" />
        ${given.rating === "bad" && html`
          <label for=${`correction-${id}`}>The right answer</label>
          <textarea id=${`correction-${id}`} class="grows code" rows="3" dir="auto" value=${given.correction ?? ""}
            onInput=${edit("correction")}></textarea>
          ${!given.correction && answer && html`<button type="button" class="link"
            onClick=${() => setGiven({ ...given, correction: answer })}>Start from this answer</button>`}`}
        <div class="rating-row">
          <button type="submit" class="button">Save</button>
          <span class="help">${meaning(given, answer)}</span>
        </div>
      </form>`}
    </section>
  `;
}
