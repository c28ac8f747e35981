// State of the run view: chosen models, form values and shown answers. It survives a visit to the history, so that a
// half-typed question is not lost.

import { batch, computed, signal } from "./vendor/signals.js";
import { ApiError, get, predictionPath, versionPath } from "./api.js";
import { collect, fieldsOf, filled, groups, streams, withoutSecrets } from "./form.js";
import { Live } from "./stream.js";
import { short } from "./text.js";
import { go } from "./router.js";

export const config = signal(null);

/** One or two of {owner, name, version, adapter}; two run side by side. */
export const targets = signal([]);
export const schema = signal(null); // the OpenAPI schema of the first target
export const schemaProblem = signal(null);
export const values = signal({});
export const lives = signal([]);
export const showProblems = signal(false);
export const announcement = signal("");
export const promoted = signal([]); // optional inputs that the prediction used, shown among the main ones
export const origin = signal(null); // the prediction that the shown one was made from

export const fields = computed(() => (schema.value ? fieldsOf(schema.value) : []));
export const grouped = computed(() => groups(fields.value, promoted.value, Object.keys(config.value?.fields ?? {})));
export const request = computed(() => collect(fields.value, values.value));
export const streaming = computed(() => streams(schema.value));
export const running = computed(() => lives.value.some((live) => live.running));

/** Whether the form differs from the input of the shown answer. */
export const edited = computed(() => {
  const asked = lives.value[0]?.prediction.value?.input;
  if (!asked || !fields.value.length) return false;
  const before = collect(fields.value, filled(fields.value, withoutSecrets(fields.value, asked))).input;
  return JSON.stringify(before) !== JSON.stringify(withoutSecrets(fields.value, request.value.input));
});

export const key = ({ owner, name, version, adapter }) => [owner, name, version, adapter ?? ""].join("/");

/** Everything that can be run: each version, and each of its adapters. */
export const choices = computed(() =>
  (config.value?.models ?? []).map((model) => ({
    label: `${model.owner}/${model.name}`,
    options: model.versions.flatMap((version) => {
      const target = { owner: model.owner, name: model.name, version: version.id, adapter: null };
      const label = (version.label || short(version.id)).replace(/^https?:\/\//, "");
      return [
        { target, label },
        ...config.value.adapters.map((adapter) => ({
          target: { ...target, adapter },
          label: `${label} with ${adapter}`,
          adapter,
        })),
      ];
    }),
  })),
);

/** The label of a version and adapter. */
export const labelOf = (target) => {
  for (const model of choices.value)
    for (const option of model.options) if (key(option.target) === key(target)) return option.label;
  return [short(target.version), target.adapter && `with ${target.adapter}`].filter(Boolean).join(" ");
};

/** The model, version and adapter, in words; the model alone where there is nothing to tell it from. */
export const nameOf = (target) => {
  const model = choices.value.find(({ label }) => label === `${target.owner}/${target.name}`);
  const alone = model?.options.length === 1 && key(model.options[0].target) === key(target);
  return alone ? target.name : `${target.name} · ${labelOf(target)}`;
};

/** What the form opens with: an example of each of the template's fields. */
const examples = () =>
  Object.fromEntries(Object.entries(config.value?.fields ?? {}).filter(([, example]) => example !== null));

/** Choose targets; the form keeps values that the new model also has. */
export async function choose(chosen, input = null) {
  const before = targets.value[0];
  const first = chosen[0];
  targets.value = chosen;
  if (!first) return;
  if (before && key({ ...before, adapter: null }) === key({ ...first, adapter: null }) && schema.value) {
    if (input) values.value = filled(fields.value, withoutSecrets(fields.value, input));
    return;
  }
  try {
    const { openapi_schema: document } = await get(versionPath(first));
    batch(() => {
      const keep = schema.value ? request.value.input : examples();
      schema.value = document;
      schemaProblem.value = null;
      values.value = filled(fields.value, input ? withoutSecrets(fields.value, input) : keep);
      showProblems.value = false;
    });
  } catch (error) {
    batch(() => {
      schema.value = null;
      schemaProblem.value = error.message;
    });
  }
}

export const set = (name, value) => {
  values.value = { ...values.value, [name]: value };
};

/** Run the form. Returns the names of invalid fields, in which case nothing is sent. */
export async function run() {
  const { input, problems } = request.value;
  if (Object.keys(problems).length) {
    showProblems.value = true;
    announcement.value = `Not sent: ${Object.keys(problems).length} to correct.`;
    return Object.keys(problems);
  }
  lives.value.forEach((live) => live.close());
  const before = lives.value.length === 1 ? lives.value[0].prediction.value?.id : null;
  const asked = targets.value.map((target) => ({ target, live: new Live(nameOf(target)) }));
  batch(() => {
    lives.value = asked.map(({ live }) => live);
    announcement.value = "Running.";
    origin.value = before ?? null;
  });
  const two = asked.length > 1;
  const created = await Promise.allSettled(
    asked.map(({ target, live }) => live.create("/v1/predictions", bodyOf(target, input))),
  );
  if (!two && created[0].status === "fulfilled" && lives.value[0] === asked[0].live) go(`/p/${created[0].value.id}`);
  if (two) go("/", { replace: true });
  return [];
}

/** A prediction's request. */
export const bodyOf = (target, input) => ({
  version: target.version,
  input: target.adapter ? { ...input, adapter: target.adapter } : input,
  stream: streaming.value,
});

export async function cancel() {
  await Promise.allSettled(lives.value.filter((live) => live.running).map((live) => live.cancel()));
}

/** Announce to screen readers how an answer ended. */
export const announceEnd = ({ status, error }) => {
  const said = { failed: `Failed: ${error.value}`, canceled: "Canceled.", aborted: "Aborted." };
  announcement.value = said[status.value] ?? "Done.";
};

/** Open a prediction from its permalink: its input in the form, its output beside it. */
export async function open(id) {
  if (lives.value.some((live) => live.prediction.value?.id === id)) return;
  lives.value.forEach((live) => live.close());
  let prediction;
  try {
    prediction = await get(predictionPath(id));
  } catch (error) {
    lives.value = [];
    const first = choices.value[0]?.options[0]?.target;
    if (first && !schema.value) await choose([first]); // so that something else can be run
    if (error.status !== 404) throw error;
    throw new ApiError("There is no such prediction. It was deleted, or the address is incomplete.", 404);
  }
  const live = new Live().show(prediction);
  batch(() => {
    lives.value = [live];
    origin.value = null;
  });
  const target = targetOf(prediction);
  live.label = whoOf(prediction);
  promoted.value = Object.keys(prediction.input ?? {});
  await choose([target], prediction.input ?? {});
}

export function targetOf(prediction) {
  const [owner, name] = (prediction.model ?? "/").split("/");
  return { owner, name, version: prediction.version ?? "", adapter: null };
}

/** The model, version and adapter of a prediction, in words. */
export function whoOf(prediction) {
  const target = targetOf(prediction);
  return nameOf({ ...target, adapter: prediction.input?.adapter || null });
}

/** Clear the form and the answers. */
export function fresh() {
  lives.value.forEach((live) => live.close());
  batch(() => {
    lives.value = [];
    values.value = filled(fields.value);
    showProblems.value = false;
    promoted.value = [];
    origin.value = null;
  });
}
