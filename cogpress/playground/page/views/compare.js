// Two predictions side by side, with their differences marked.

import { useEffect, useState } from "../vendor/hooks.js";
import { html } from "../html.js";
import { get, predictionPath } from "../api.js";
import { inputs, inputText, sides } from "../compare.js";
import { pretty } from "../json.js";
import { asText, count, duration, short, speed, when } from "../text.js";
import { whoOf } from "../workbench.js";
import { Notice, Status, Text } from "./parts.js";

export function Compare({ a, b }) {
  const [pair, setPair] = useState(null);
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    setPair(null);
    setProblem(null);
    if (!a || !b) return setProblem("Choose two predictions in the history to compare them.");
    Promise.all([a, b].map((id) => get(predictionPath(id)))).then(setPair, (error) => setProblem(error.message));
    return undefined;
  }, [a, b]);
  if (problem) {
    return html`<div class="compare">
      <${Notice} kind="error">${problem} <a href="/?view=history">Go to the history</a></${Notice}>
    </div>`;
  }
  if (!pair) return html`<div class="compare"><p class="waiting">Loading…</p></div>`;
  return html`<div class="compare"><${Pair} left=${pair[0]} right=${pair[1]} /></div>`;
}

function Pair({ left, right }) {
  const { differing, equal } = inputs(left.input, right.input);
  const line = matchMedia("(max-width: 560px)").matches ? 40 : 58;
  const outputs = [left, right].map((prediction) => pretty(asText(prediction.output), line));
  const output = sides(...outputs);
  const same = outputs[0] === outputs[1];
  return html`
    <h1 class="compare-title">${same ? "The outputs are the same" : "The outputs differ"}${differing.length
      ? `; ${differing.length === 1 ? "one input differs" : `${differing.length} inputs differ`}`
      : "; the inputs are the same"}</h1>
    <div class="compare-heads">
      <${Head} letter="A" prediction=${left} />
      <${Head} letter="B" prediction=${right} />
    </div>
    <section aria-labelledby="compare-inputs">
      <h2 id="compare-inputs">Input</h2>
      ${differing.map(
        ({ name, left: before, right: after }) =>
          html`<${Row} key=${name} name=${name} ...${rowOf(before, after)} />`,
      )}
      ${equal.length > 0 && html`<details class="folded" open=${!differing.length}>
        <summary>
          <span class="folded-title">Same in both</span>
          <span class="folded-summary">${equal.map(({ name }) => name).join(" · ")}</span>
        </summary>
        <dl class="equal">${equal.map(({ name, value }) => html`<div key=${name}>
          <dt><code>${name}</code></dt>
          <dd dir="auto" class=${isJson(inputText(value)) ? "is-json" : ""}>
            <${Text} text=${pretty(inputText(value))} />
          </dd>
        </div>`)}</dl>
      </details>`}
    </section>
    <section aria-labelledby="compare-outputs">
      <h2 id="compare-outputs">Output</h2>
      ${!output.exact && html`<${Notice}>The outputs are too long and too different to mark word by word.</${Notice}>`}
      <div class="compare-sides outputs">
        <${Side} letter="A" tag="del" parts=${output.left} empty="No output." json=${isJson(outputs[0])} />
        <${Side} letter="B" tag="ins" parts=${output.right} empty="No output." json=${isJson(outputs[1])} />
      </div>
    </section>
    <section aria-labelledby="compare-metrics">
      <h2 id="compare-metrics">Figures</h2>
      <table class="metrics figures-table"><thead>
        <tr><th scope="col"></th><th scope="col">A</th><th scope="col">B</th></tr>
        </thead><tbody>
        ${FIGURES.map(([name, label, show]) => html`<tr key=${name}>
          <th scope="row">${label}</th>
          ${[left, right].map(
            ({ metrics }) => html`<td>${typeof metrics?.[name] === "number" ? show(metrics[name]) : "–"}</td>`,
          )}
        </tr>`)}
      </tbody></table>
    </section>
  `;
}

const isJson = (text) => /^\s*[[{]/.test(text);

const FIGURES = [
  ["time_to_first_token", "First token", duration],
  ["tokens_per_second", "Tokens per second", speed],
  ["output_token_count", "Tokens", count],
  ["predict_time", "Time", duration],
];

const rowOf = (before, after) => {
  const { left, right } = sides(inputText(before), inputText(after));
  return { left, right, unset: [before === undefined, after === undefined] };
};

const Head = ({ letter, prediction }) => html`<div class="compare-head">
  <span class="letter">${letter}</span>
  <div><a href=${`/p/${prediction.id}`}>${short(prediction.id).slice(0, 12)}</a> <${Status}
      status=${prediction.status} />
    <div class="compare-who">${whoOf(prediction)} · <time
        datetime=${prediction.created_at}>${when(prediction.created_at)}</time></div></div>
</div>`;

const Row = ({ name, left, right, unset }) => html`<div class="compare-row">
  <code class="compare-name">${name}</code>
  <div class="compare-sides">
    <${Side} letter="A" tag="del" parts=${left} empty=${unset[0] ? "Not set." : "Empty."} />
    <${Side} letter="B" tag="ins" parts=${right} empty=${unset[1] ? "Not set." : "Empty."} />
  </div>
</div>`;

const Side = ({ letter, tag, parts, empty, json }) => html`<div class=${`side${json ? " is-json" : ""}`} dir="auto"
  data-side=${letter}>
  ${parts.some((part) => part.text)
    ? parts.map((part) =>
        part.changed ? html`<${tag}><${Text} text=${part.text} /></${tag}>` : html`<${Text} text=${part.text} />`,
      )
    : html`<span class="nothing">${empty}</span>`}
</div>`;
