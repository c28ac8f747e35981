// One field of the form: label, control, problem and description.

import { useState } from "../vendor/hooks.js";
import { html } from "../html.js";
import { upload } from "../api.js";
import { changed, read } from "../form.js";
import { pretty } from "../json.js";
import { count } from "../text.js";
import { config, set, showProblems, values } from "../workbench.js";

// Smaller files are sent inside the prediction; larger ones are uploaded first.
const INLINE_BYTES = 256 * 1024;

export function Field({ field, compact = false }) {
  const value = values.value[field.name];
  const { problem } = read(field, value);
  const [left, setLeft] = useState(false);
  // JSON is checked while typing; other fields only once they lose focus.
  const wrong = problem && (showProblems.value || (field.kind === "json" && value) || left) ? problem : null;
  const id = `input-${field.name}`;
  const described =
    [field.description && `${id}-help`, wrong && `${id}-problem`].filter(Boolean).join(" ") || undefined;
  const common = {
    id,
    "aria-describedby": described,
    "aria-invalid": wrong ? "true" : undefined,
    "aria-required": field.required ? "true" : undefined,
    onBlur: () => setLeft(true),
  };
  const Control = CONTROLS[field.kind];
  return html`
    <div class=${`field kind-${field.kind}${compact ? " compact" : ""}`}
      data-changed=${changed(field, value) ? "" : undefined}>
      <div class="field-head">
        <label for=${id}>${field.title}${
          field.required ? html`<span class="needed" title="required"> *</span>` : null
        }</label>
        <code>${field.name}</code>
      </div>
      <${Control} field=${field} value=${value} common=${common} change=${(next) => set(field.name, next)} />
      ${wrong && html`<p class="problem" id=${`${id}-problem`}>${wrong}</p>`}
      ${field.description && html`<p class="help" id=${`${id}-help`}>${field.description}</p>`}
    </div>
  `;
}

const typed = (change) => (event) => change(event.currentTarget.value);

function TextControl({ field, value, common, change }) {
  if (field.name === "adapter") return html`<${AdapterControl} ...${{ value, common, change }} />`;
  const rows = field.order === 0 || field.required || field.lines ? 5 : 2;
  return html`<textarea ...${common} class="grows" rows=${rows} dir="auto" spellcheck="true" value=${value}
    onInput=${typed(change)}></textarea>`;
}

function AdapterControl({ value, common, change }) {
  if (!config.value?.adapters.length)
    return html`<input ...${common} type="text" autocomplete="off" value=${value} onInput=${typed(change)} />`;
  return html`<select ...${common} value=${value} onChange=${typed(change)}>
    <option value="">None</option>
    ${config.value.adapters.map((name) => html`<option value=${name}>${name}</option>`)}
  </select>`;
}

function JsonControl({ field, value, common, change }) {
  const tidy = value ? pretty(value) : value;
  return html`
    <textarea ...${common} class="grows code" rows="3" spellcheck="false" autocapitalize="off" autocomplete="off"
      value=${value} onInput=${typed(change)}></textarea>
    <div class="field-tools">
      ${!value && field.example && html`<button type="button" class="link"
        onClick=${() => change(pretty(field.example))}>Start from an example</button>`}
      ${value && tidy !== value &&
      html`<button type="button" class="link" onClick=${() => change(tidy)}>Format</button>`}
    </div>
  `;
}

function NumberControl({ field, value, common, change }) {
  const { minimum: low, maximum: high, kind } = field;
  const bounded = low !== null && high !== null && high - low <= 1000;
  const step = kind === "integer" ? 1 : high - low <= 10 ? 0.01 : 0.1;
  return html`<div class="number">
    <input ...${common} type="text" inputmode=${kind === "integer" && !(low < 0) ? "numeric" : "text"}
      autocomplete="off" value=${value} onInput=${typed(change)} placeholder=${field.nullable ? "empty" : ""} />
    ${bounded && !field.nullable
      ? html`<input type="range" aria-label=${`${field.title}, slider`} min=${low} max=${high} step=${step}
          value=${value} onInput=${typed(change)} />`
      : html`<span class="bounds">${bounds(field)}</span>`}
  </div>`;
}

function bounds({ minimum: low, maximum: high }) {
  const top = high !== null && high < 1e9 ? count(high) : null;
  if (low !== null && top) return `${count(low)} to ${top}`;
  if (low !== null) return `from ${count(low)}`;
  return top ? `up to ${top}` : "";
}

function BooleanControl({ field, value, common, change }) {
  if (!field.nullable)
    return html`<input ...${common} type="checkbox" checked=${value}
      onChange=${(event) => change(event.currentTarget.checked)} />`;
  return html`<select ...${common} value=${value} onChange=${typed(change)}>
    <option value="">Not set</option>
    <option value="true">Yes</option>
    <option value="false">No</option>
  </select>`;
}

const ChoiceControl = ({ field, value, common, change }) => html`<select ...${common} value=${value}
  onChange=${typed(change)}>
  ${(field.nullable || (field.required && field.default === null)) &&
  html`<option value="">${field.nullable ? "Not set" : "Choose…"}</option>`}
  ${field.choices.map((choice) => html`<option value=${String(choice)}>${String(choice)}</option>`)}
</select>`;

const SecretControl = ({ value, common, change }) =>
  html`<input ...${common} type="password" autocomplete="off" value=${value} onInput=${typed(change)} />`;

function FileControl({ field, value, common, change }) {
  const [state, setState] = useState("");
  const many = field.kind === "files";
  const choose = async (event) => {
    const files = [...event.currentTarget.files];
    setState("Reading…");
    try {
      const urls = await Promise.all(files.map(urlOf));
      change(many ? urls : (urls[0] ?? ""));
      setState(files.map((file) => `${file.name}, ${count(file.size)} bytes`).join("; "));
    } catch (error) {
      setState(error.message);
    }
  };
  const given = many ? (value?.length ? `${value.length} files` : "") : value;
  const inside = given?.startsWith?.("data:");
  return html`<div class="file">
    <input ...${common} type="file" multiple=${many} onChange=${choose} />
    ${!many && html`<input type="text" aria-label=${`${field.title}, URL`} placeholder="or a URL: https://…"
      value=${inside ? "" : given} onInput=${typed(change)} />`}
    <span class="bounds" role="status">${state || (inside ? "a file, sent with the prediction" : "")}</span>
  </div>`;
}

function urlOf(file) {
  if (file.size > INLINE_BYTES) return upload(file);
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`Cannot read ${file.name}.`));
    reader.readAsDataURL(file);
  });
}

const CONTROLS = {
  text: TextControl,
  json: JsonControl,
  integer: NumberControl,
  number: NumberControl,
  boolean: BooleanControl,
  choice: ChoiceControl,
  secret: SecretControl,
  file: FileControl,
  files: FileControl,
};
