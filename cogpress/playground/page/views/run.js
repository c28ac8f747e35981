// The run view: the form on one side, the answers on the other.

import { useEffect, useRef, useState } from "../vendor/hooks.js";
import { html } from "../html.js";
import { changed } from "../form.js";
import { page } from "../history.js";
import { go } from "../router.js";
import { ended } from "../stream.js";
import { headline, when } from "../text.js";
import {
  cancel, choices, choose, edited, fields, fresh, grouped, key, lives, open, origin, request, run, running,
  schema, schemaProblem, showProblems, targets, values,
} from "../workbench.js";
import { Answer } from "./answer.js";
import { Field } from "./field.js";
import { Notice, Text } from "./parts.js";

const RECENT = 5;

export function Run({ id }) {
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    setProblem(null);
    if (id) open(id).catch((error) => setProblem(error.message));
  }, [id]);
  return html`
    <div class="bench">
      <${Form} />
      <section class="answers" id="answer" aria-label="Answer" tabindex="-1">
        ${problem
          ? html`<div class="answer"><${Notice} kind="error">${problem}</${Notice}></div>`
          : html`<${Answers} />`}
      </section>
    </div>
  `;
}

function Form() {
  const form = useRef(null);
  const submit = async (event) => {
    event?.preventDefault();
    if (running.value || !schema.value) return;
    const wrong = await run();
    if (wrong.length) {
      // Focus the first invalid field, unfolding it if needed.
      const { name } = fields.value.find((field) => wrong.includes(field.name));
      const control = document.getElementById(`input-${name}`);
      control?.closest("details")?.setAttribute("open", "");
      control?.focus();
    } else if (matchMedia("(max-width: 899px)").matches) {
      document.getElementById("answer").scrollIntoView();
    }
  };
  const clear = () => {
    fresh();
    go("/");
    form.current.querySelector("textarea, input")?.focus();
  };
  useEffect(() => {
    const onKeyDown = (event) => {
      if (event.target.closest?.(".rating")) return; // it has its own form
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
      else if (event.key === "Escape" && running.value) cancel();
    };
    addEventListener("keydown", onKeyDown);
    return () => removeEventListener("keydown", onKeyDown);
  }, []);
  return html`
    <form class="form" ref=${form} onSubmit=${submit} novalidate aria-label="Input"
      data-asked=${lives.value.length ? "" : undefined}>
      <${Targets} />
      ${schemaProblem.value && html`<${Notice} kind="error">${schemaProblem.value}</${Notice}>`}
      ${schema.value
        ? html`<${Fields} />`
        : !schemaProblem.value && html`<p class="waiting">Loading the model’s inputs…</p>`}
      <div class="form-foot">
        ${running.value
          ? html`<button type="button" class="button stop" onClick=${cancel}>Cancel <kbd>Esc</kbd></button>`
          : html`<button type="submit" class="button primary" disabled=${!schema.value}>
              ${targets.value.length > 1 ? "Run both" : "Run"} <kbd>${modifier}</kbd>
            </button>`}
        <button type="button" class="button quiet" onClick=${clear}>Clear</button>
        <${Hint} />
      </div>
    </form>
  `;
}

const modifier = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘ Enter" : "Ctrl Enter";

function Hint() {
  const wrong = Object.keys(request.value.problems).length;
  if (showProblems.value && wrong) return html`<span class="hint wrong">${wrong} to correct</span>`;
  if (edited.value && !running.value) return html`<span class="hint">changed since this answer</span>`;
  return null;
}

/** The choice of one or two models. */
export function Targets({ single = false }) {
  const chosen = targets.value;
  const all = choices.value;
  const flat = all.flatMap((model) => model.options);
  const two = chosen.length > 1;
  const pick = (index) => (event) => {
    const option = flat.find(({ target }) => key(target) === event.currentTarget.value);
    choose(chosen.map((before, at) => (at === index ? option.target : before)));
  };
  // The default second target: another version, or the same one with an adapter.
  const other = flat.find(({ target }) => key(target) !== key(chosen[0] ?? target))?.target;
  return html`
    <div class="targets">
      ${chosen.map((target, index) => {
        const known = flat.some((option) => key(option.target) === key(target));
        return html`<div class="target" key=${index}>
          <label for=${`target-${index}`}>${two ? `Model ${"AB"[index]}` : "Model"}</label>
          <select id=${`target-${index}`} value=${key(target)} onChange=${pick(index)}>
            ${!known && html`<option value=${key(target)}>${target.name} (not available)</option>`}
            ${all.map(
              (model) => html`<optgroup label=${model.label} key=${model.label}>
                ${model.options
                  .filter((option) => two || single || !option.adapter || key(option.target) === key(target))
                  .map((option) => html`<option value=${key(option.target)} key=${key(option.target)}>
                    ${`${option.target.name} · ${option.label}`}
                  </option>`)}
              </optgroup>`,
            )}
          </select>
        </div>`;
      })}
      ${other && !single &&
      html`<button type="button" class="link"
        onClick=${() => choose(two ? [{ ...chosen[0], adapter: null }] : [chosen[0], other])}>
        ${two ? "Use one model only" : "Compare with a second model"}
      </button>`}
    </div>
  `;
}

function Fields() {
  const { main, settings, more, settingsOpen } = grouped.value;
  return html`
    ${main.map((field) => html`<${Field} field=${field} key=${field.name} />`)}
    ${more.length > 0 && html`<${Folded} title="More options" fields=${more} />`}
    ${settings.length > 0 && html`<${Folded} title="Settings" fields=${settings} open=${settingsOpen} compact />`}
  `;
}

/** Folded fields; the heading names those that are set. */
export function Folded({ title, fields: inside, open: unfolded = false, compact = false }) {
  const set = inside.filter((field) => changed(field, values.value[field.name]));
  const [isOpen, setOpen] = useState(unfolded);
  const summary = set.length
    ? set.map((field) => (compact ? `${field.title} ${values.value[field.name]}` : field.title)).join(" · ")
    : inside.map((field) => field.title).join(" · ");
  return html`<details class="folded" open=${isOpen} onToggle=${(event) => setOpen(event.currentTarget.open)}>
    <summary>
      <span class="folded-title">${title}</span>
      ${set.length > 0 && html`<span class="badge">${set.length} set</span>`}
      <span class="folded-summary">${!isOpen || set.length ? summary : ""}</span>
    </summary>
    <div class=${compact ? "fields grid" : "fields"}>
      ${inside.map((field) => html`<${Field} field=${field} compact=${compact} key=${field.name} />`)}
    </div>
  </details>`;
}

function Answers() {
  const shown = lives.value;
  if (!shown.length) return html`<${Empty} />`;
  const two = shown.length > 1;
  const ids = shown.map((live) => live.prediction.value?.id);
  const done = shown.every((live) => ended(live.status.value) && live.prediction.value);
  return html`
    <div class=${two ? "answer-pair" : "answer-one"}>
      ${shown.map((live, index) => html`<${Answer} live=${live} key=${index} letter=${two ? "AB"[index] : ""} />`)}
    </div>
    ${done && two && html`<p class="after">
      <a class="button" href=${`/compare?a=${ids[0]}&b=${ids[1]}`}>Mark the differences</a>
    </p>`}
    ${done && !two && origin.value && origin.value !== ids[0] && html`<p class="after">
      <a class="button" href=${`/compare?a=${origin.value}&b=${ids[0]}`}>Compare with the previous answer</a>
    </p>`}
  `;
}

const Empty = () => html`
  <div class="empty">
    <p class="empty-line">The answer will appear here.</p>
    <p>Fill in the form and press <kbd>${modifier}</kbd>. Every answer gets a link that you can share.</p>
    <${Recent} />
  </div>
`;

/** The most recent predictions. */
function Recent() {
  const [rows, setRows] = useState([]);
  useEffect(() => {
    // The page works without them.
    page({}).then((got) => setRows(got.results.slice(0, RECENT)), () => {});
  }, []);
  if (!rows.length) return null;
  return html`<h2 class="recent-title">Recent</h2>
    <ol class="recent">${rows.map((row) => html`<li key=${row.id}>
      <a href=${`/p/${row.id}`} dir="auto"><${Text} text=${headline(row.input_preview)} /></a>
      <time datetime=${row.created_at}>${when(row.created_at)}</time></li>`)}</ol>
    <a href="/?view=history">All history</a>`;
}
