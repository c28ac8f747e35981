// The Code tab: programs for the current input.

import { signal } from "../vendor/signals.js";
import { html } from "../html.js";
import { LANGUAGES, program } from "../code.js";
import { fields, request, streaming, targets } from "../workbench.js";
import { Copy, Notice, Tabs, Text } from "./parts.js";

const language = signal("python"); // shared by all answers: people use one language

export function Code() {
  const target = targets.value[0];
  const { input, problems } = request.value;
  if (!target || !fields.value.length)
    return html`<p class="nothing">The model’s inputs are unknown, so there is no code.</p>`;
  // OpenAI's API needs a prompt or messages.
  const speaks = fields.value.some(({ name }) => name === "prompt" || name === "messages");
  const languages = LANGUAGES.filter(({ id }) => id !== "openai" || speaks);
  const active = languages.some(({ id }) => id === language.value) ? language.value : "python";
  const left = Object.keys(problems);
  const text = program(active, {
    ...target,
    base: location.origin,
    input: target.adapter ? { ...input, adapter: target.adapter } : input,
    streaming: streaming.value,
    secrets: fields.value.filter((field) => field.kind === "secret").map((field) => field.name),
  });
  return html`
    <div class="program">
      <${Tabs} name="code" label="Language" tabs=${languages} active=${active}
        onChange=${(id) => (language.value = id)}>
        ${left.length > 0 && html`<${Notice}>Left out until valid: ${left.join(", ")}.</${Notice}>`}
        <pre class="code" data-testid="code" tabindex="0" aria-label="Code"><${Text} text=${text} /></pre>
      </${Tabs}>
      <div class="program-foot"><${Copy} text=${text} label="Copy code" /></div>
    </div>
  `;
}
