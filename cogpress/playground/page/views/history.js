// The history: past predictions with search, filters, and selection for comparing.

import { useEffect, useRef, useState } from "../vendor/hooks.js";
import { html } from "../html.js";
import { address, filtersOf, page } from "../history.js";
import { download } from "../rating.js";
import { go, here } from "../router.js";
import { count, duration, headline, short, speed, when } from "../text.js";
import { announcement, config, labelOf } from "../workbench.js";
import { Notice, Status, statusWord, Text } from "./parts.js";

const TYPING_MS = 250;
const STATUSES = ["succeeded", "failed", "canceled", "aborted", "processing", "starting"].map((status) => [
  status,
  statusWord(status),
]);
const RATINGS = [["good", "Good"], ["bad", "Bad"], ["none", "Not rated"]];

export function History({ with: partner }) {
  const filters = filtersOf(here.value.search);
  const query = JSON.stringify(filters);
  const [state, setState] = useState({ results: [], next: null, total: null, loading: true, problem: null });
  const [chosen, setChosen] = useState(partner ? [partner] : []);
  const abort = useRef(null);

  const load = async (next = null) => {
    abort.current?.abort();
    const controller = (abort.current = new AbortController());
    setState((before) => ({ ...before, loading: true, problem: null }));
    try {
      const got = await page(filters, { next, signal: controller.signal });
      setState((before) => ({
        ...got,
        results: next ? [...before.results, ...got.results] : got.results,
        loading: false,
        problem: null,
      }));
      if (!next) announcement.value = `${count(got.total)} predictions.`;
    } catch (error) {
      if (error.name !== "AbortError") setState((before) => ({ ...before, loading: false, problem: error.message }));
    }
  };
  useEffect(() => {
    load();
    return () => abort.current?.abort();
  }, [query]);

  const change = (name, value) =>
    go(address({ ...filters, [name]: value }, partner ? { with: partner } : {}), { replace: true });
  const mark = (id) =>
    setChosen((before) => (before.includes(id) ? before.filter((one) => one !== id) : [...before, id].slice(-2)));
  const { results, next, total, loading, problem } = state;
  const filtered = Object.values(filters).some(Boolean);
  const unit = filtered ? "found" : total === 1 ? "prediction" : "predictions";
  return html`
    <div class="history">
      <div class="history-head">
        <h1>History</h1>
        <span class="history-total" role="status">${total === null ? "" : `${count(total)} ${unit}`}</span>
        <${Export} />
      </div>
      <${Filters} filters=${filters} change=${change} />
      ${partner && html`<${Notice}>Choose a prediction to compare with ${short(partner).slice(0, 12)}.</${Notice}>`}
      ${problem && html`<${Notice} kind="error">${problem}</${Notice}>`}
      ${!loading && !problem && results.length === 0 && html`<p class="nothing">
        ${filtered
          ? html`<span>No predictions match these filters.</span> <a href="/?view=history">Show all</a>`
          : "No predictions yet."}
      </p>`}
      <ol class="rows" aria-busy=${String(loading)}>
        ${results.map(
          (row) => html`<${Row} key=${row.id} row=${row} marked=${chosen.includes(row.id)} mark=${mark} />`,
        )}
      </ol>
      <div class="history-foot">
        ${next && html`<button type="button" class="button" disabled=${loading} onClick=${() => load(next)}>
          ${loading ? "Loading…" : "Show more"}
        </button>`}
        ${results.length > 0 &&
        html`<span class="help">${count(results.length)} of ${count(total ?? results.length)}</span>`}
      </div>
      ${chosen.length > 0 && html`<div class="chosen" role="region" aria-label="Comparison">
        <span>${chosen.length === 2 ? "Two chosen" : "One chosen; choose another to compare"}</span>
        ${chosen.length === 2 &&
        html`<a class="button primary" href=${`/compare?a=${chosen[0]}&b=${chosen[1]}`}>Compare</a>`}
        <button type="button" class="button quiet" onClick=${() => setChosen([])}>Clear</button>
      </div>`}
    </div>
  `;
}

function Filters({ filters, change }) {
  const [text, setText] = useState(filters.q);
  const timer = useRef(null);
  const type = (event) => {
    const { value } = event.currentTarget;
    setText(value);
    clearTimeout(timer.current);
    timer.current = setTimeout(() => change("q", value), TYPING_MS);
  };
  useEffect(() => () => clearTimeout(timer.current), []);
  const models = (config.value?.models ?? []).map((model) => `${model.owner}/${model.name}`);
  const versions = (config.value?.models ?? [])
    .filter((model) => !filters.model || `${model.owner}/${model.name}` === filters.model)
    .flatMap((model) => model.versions.map((version) => [version.id, version.label || short(version.id)]));
  return html`
    <form class="filters" role="search"
      onSubmit=${(event) => (event.preventDefault(), clearTimeout(timer.current), change("q", text))}>
      <div class="filter wide"><label for="filter-q">Search</label>
        <input id="filter-q" type="search" placeholder="words in the input or output" value=${text}
          onInput=${type} /></div>
      <${Pick} id="status" label="Status" value=${filters.status} change=${change} options=${STATUSES} />
      <${Pick} id="rating" label="Rating" value=${filters.rating} change=${change} options=${RATINGS} />
      ${(models.length > 1 || filters.model) &&
      html`<${Pick} id="model" label="Model" value=${filters.model} change=${change}
        options=${models.map((name) => [name, name])} />`}
      ${(versions.length > 1 || filters.version) &&
      html`<${Pick} id="version" label="Version" value=${filters.version} change=${change} options=${versions} />`}
    </form>
  `;
}

const Pick = ({ id, label, value, change, options }) => html`<div class="filter">
  <label for=${`filter-${id}`}>${label}</label>
  <select id=${`filter-${id}`} value=${value} onChange=${(event) => change(id, event.currentTarget.value)}>
    <option value="">All</option>
    ${options.map(([of, text]) => html`<option value=${of} key=${of}>${text}</option>`)}
  </select></div>`;

const figuresOf = (row) => {
  const [owner, name] = (row.model ?? "/").split("/");
  const version = row.version && labelOf({ owner, name, version: row.version, adapter: null });
  const rate = row.tokens_per_second && `${speed(row.tokens_per_second)} tok/s`;
  return [version, rate, row.predict_time && duration(row.predict_time)].filter(Boolean).join(" · ");
};

const RATING = { good: "Good", bad: "Bad" };

function Row({ row, marked, mark }) {
  return html`<li class="row" data-marked=${marked ? "" : undefined}>
    <input type="checkbox" class="row-mark" aria-label=${`Choose for comparison: ${headline(row.input_preview)}`}
      checked=${marked} onChange=${() => mark(row.id)} />
    <div class="row-texts">
      <a class="row-input" href=${`/p/${row.id}`} dir="auto"><${Text} text=${headline(row.input_preview)} /></a>
      <span class="row-output" dir="auto"><${Text} text=${row.output_preview ?? ""} /></span>
      ${row.note && html`<span class="row-note" dir="auto"><${Text} text=${row.note} /></span>`}
    </div>
    <div class="row-facts">
      <span class="row-state">
        ${row.rating && html`<span class="rated" data-rating=${row.rating}>${RATING[row.rating]}</span>`}
        ${row.status !== "succeeded" && html`<${Status} status=${row.status} />`}
        <time datetime=${row.created_at} title=${row.created_at}>${when(row.created_at)}</time>
      </span>
      <span class="row-figures">${figuresOf(row)}</span>
    </div>
  </li>`;
}

/** The menu that exports rated answers as training data. */
function Export() {
  const [state, setState] = useState("");
  const menu = useRef(null);
  const save = async (which) => {
    menu.current.open = false;
    try {
      const { rows, leftOut } = await download(which);
      const left = leftOut ? `; ${count(leftOut)} left out without a right answer` : "";
      setState(`${count(rows)} ${rows === 1 ? "example" : "examples"} exported${left}.`);
    } catch (error) {
      setState(error.message);
    }
  };
  const close = (event) => {
    if (event.key !== "Escape") return;
    menu.current.open = false;
    menu.current.querySelector("summary").focus();
  };
  return html`<div class="export">
    <details class="menu" ref=${menu} onKeyDown=${close}>
      <summary class="button">Export rated</summary>
      <div class="menu-items">
        <button type="button" onClick=${() => save("all")}>All rated answers</button>
        <button type="button" onClick=${() => save("good")}>Good answers</button>
        <button type="button" onClick=${() => save("bad")}>Bad answers, as corrected</button>
        <p class="help">JSONL for training, one example per line.</p>
      </div>
    </details>
    <span class="help" role="status">${state}</span>
  </div>`;
}
