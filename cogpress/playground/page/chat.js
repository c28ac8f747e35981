// State of the chat view: the turns of one conversation and its system text. It survives a visit to other views.

import { batch, computed, signal } from "./vendor/signals.js";
import { announcement, bodyOf, config, fields, grouped, nameOf, request, targets } from "./workbench.js";
import { ended, Live } from "./stream.js";

// Inputs that the conversation takes the place of.
const REPLACED = ["prompt", "messages", "fields", "system_prompt"];

export const system = signal("");

/** What is typed and not sent yet. */
export const draft = signal("");

/** Pairs of {asked, live}: a text of the user's and the answer to it. */
export const turns = signal([]);

const messages = computed(() => fields.value.find(({ name }) => name === "messages"));

/** Whether the model takes a whole conversation, and has no form of its own for a task. */
export const converses = computed(
  () =>
    Boolean(messages.value) &&
    !fields.value.some(({ name, required }) => required && name !== "messages") &&
    !fields.value.some(({ name }) => name in (config.value?.fields ?? {})),
);

/** The inputs that may be set beside the conversation. */
export const settings = computed(() => {
  const { main, more, settings: others } = grouped.value;
  return [...others, ...more, ...main].filter(({ name }) => !REPLACED.includes(name));
});

const last = computed(() => turns.value.at(-1)?.live ?? null);
export const answering = computed(() => Boolean(last.value) && !ended(last.value.status.value));

/** Whether the last answer came to nothing; models expect one between two texts of the user's. */
export const unanswered = computed(() => Boolean(last.value) && !answering.value && !last.value.text.value);

/** The first problem of a setting, as {field, problem}. */
export const wrong = computed(() => {
  const field = settings.value.find(({ name }) => request.value.problems[name]);
  return field ? { field, problem: request.value.problems[field.name] } : null;
});

/** The input of a prediction that answers `asked` after the turns `before`. */
function inputOf(before, asked) {
  const said = before.flatMap((turn) => [
    { role: "user", content: turn.asked },
    { role: "assistant", content: turn.live.text.value },
  ]);
  const first = system.value.trim() ? [{ role: "system", content: system.value }] : [];
  const all = [...first, ...said, { role: "user", content: asked }];
  const names = settings.value.map(({ name }) => name);
  const set = Object.entries(request.value.input).filter(([name]) => names.includes(name));
  return { ...Object.fromEntries(set), messages: messages.value.parsed ? all : JSON.stringify(all) };
}

function answer(before, asked) {
  const [target] = targets.value;
  const live = new Live(nameOf(target));
  const body = bodyOf(target, inputOf(before, asked));
  batch(() => {
    turns.value = [...before, { asked, live }];
    announcement.value = "Answering.";
  });
  live.create("/v1/predictions", body).catch(() => {}); // the answer shows why
}

/** Send what is typed. */
export function say() {
  const asked = draft.value;
  if (!asked.trim() || !converses.value || answering.value || unanswered.value || wrong.value) return;
  draft.value = "";
  answer(turns.value, asked);
}

/** Answer the last text again; the earlier answer stays in the history. */
export function regenerate() {
  const { asked, live } = turns.value.at(-1);
  live.close();
  answer(turns.value.slice(0, -1), asked);
}

export const stop = () => last.value?.cancel().catch(() => {});

/** Take back a text of the user's, with all that followed, to send another one. */
export function edit(index) {
  const { asked } = turns.value[index];
  turns.value.slice(index).forEach(({ live }) => live.close());
  batch(() => {
    draft.value = asked;
    turns.value = turns.value.slice(0, index);
  });
}

/** Begin anew; the system text and the settings stay. */
export function begin() {
  turns.value.forEach(({ live }) => live.close());
  turns.value = [];
}

/** The conversation of a prediction, as {system, turns}; null if it has none that can go on. */
export function conversationOf({ input, output, status }) {
  if (!ended(status) || !input) return null;
  const { messages: given, prompt, fields: form } = input;
  let said = typeof prompt === "string" && prompt && !form ? [{ role: "user", content: prompt }] : [];
  try {
    if (given) said = typeof given === "string" ? JSON.parse(given) : [...given];
  } catch {
    return null;
  }
  if (!Array.isArray(said)) return null;
  const first = said[0]?.role === "system" ? said.shift().content : (input.system_prompt ?? "");
  const whole = said.every(({ role, content }, index) =>
    typeof content === "string" && role === ["user", "assistant"][index % 2]);
  return output && whole && said.length % 2 ? { system: first, said } : null;
}

/** Go on with the conversation of a prediction. */
export function resume(prediction, live) {
  const { system: first, said } = conversationOf(prediction);
  begin();
  batch(() => {
    system.value = first;
    turns.value = said
      .filter(({ role }) => role === "user")
      .map(({ content }, index) => {
        const before = said[2 * index + 1];
        const earlier = before && new Live().show({ status: "succeeded", output: before.content });
        return { asked: content, live: earlier ?? live };
      });
  });
}
