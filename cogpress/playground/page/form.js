// The model's OpenAPI schema as a form: which fields, in which order and group, what a filled-in form sends, and what
// is wrong with it. Nothing here touches the page.

import { problem } from "./json.js";

// Up to this many settings are shown at once; more are folded away, with what was changed in their heading.
const FEW = 4;
const SAFE = Number.MAX_SAFE_INTEGER;

const resolve = (schema, document) => {
  const reference = schema?.$ref ?? schema?.allOf?.find((part) => part.$ref)?.$ref;
  if (!reference) return schema;
  const target = reference.replace(/^#\//, "").split("/").reduce((node, key) => node?.[key], document);
  return { ...target, ...schema, title: schema.title ?? target?.title };
};

/** "Max Tokens" as people write it; names in capitals stay. */
export const sentence = (title) =>
  title
    .replace(/ ([A-Z])(?=[a-z])/g, (_, letter) => ` ${letter.toLowerCase()}`)
    .replace(/^./, (first) => first.toUpperCase())
    .replace(/\b(json|url|id|api|html|sql)\b/gi, (word) => word.toUpperCase());

function kindOf(schema) {
  if (schema.enum) return "choice";
  if (schema.format === "password" || schema["x-cog-secret"]) return "secret";
  if (schema.type === "string" && schema.format === "uri") return "file";
  if (schema.type === "array" && schema.items?.format === "uri") return "files";
  if (["integer", "number", "boolean"].includes(schema.type)) return schema.type;
  if (schema.type === "array" || schema.type === "object" || schema.type === undefined) return "json";
  return /\bJSON\b/.test(schema.description ?? "") ? "json" : "text";
}

/** What a JSON text must be, by the words of its description, and whether plain text is fine too. */
function jsonOf(schema) {
  const words = schema.description ?? "";
  if (schema.type === "array") return { wanted: "list", lenient: false, parsed: true };
  if (schema.type === "object") return { wanted: "object", lenient: false, parsed: true };
  if (schema.type !== "string") return { wanted: "any", lenient: false, parsed: true };
  const wanted = /JSON list/.test(words) ? "list" : /JSON (object|schema)/.test(words) ? "object" : "any";
  return { wanted, lenient: /several as a JSON/i.test(words), parsed: false };
}

/** The first JSON in a description, such as after "such as", laid out for a field. */
export function exampleIn(description) {
  const start = (description ?? "").search(/[[{]/);
  if (start < 0) return null;
  for (let end = description.length; end > start + 2; end--) {
    const part = description.slice(start, end);
    if (/[\]}]$/.test(part) && !problem(part)) return part;
  }
  return null;
}

/** The inputs of a model, in its order. */
export function fieldsOf(document) {
  const input = document?.components?.schemas?.Input;
  const required = new Set(input?.required ?? []);
  const fields = Object.entries(input?.properties ?? {}).map(([name, given]) => {
    const union = given.anyOf?.filter((part) => part.type !== "null");
    const schema = resolve(union?.length === 1 ? { ...given, anyOf: undefined, ...union[0] } : given, document);
    const nullable = Boolean(given.nullable ?? schema.nullable ?? given.anyOf?.some((part) => part.type === "null"));
    const kind = kindOf(schema);
    const field = {
      name,
      kind,
      title: sentence(schema.title ?? name.replaceAll("_", " ")),
      description: schema.description ?? "",
      order: schema["x-order"] ?? Infinity,
      required: required.has(name),
      nullable,
      default: schema.default ?? null,
      minimum: schema.minimum ?? null,
      maximum: schema.maximum ?? null,
      minLength: schema.minLength ?? null,
      maxLength: schema.maxLength ?? null,
      choices: schema.enum ?? null,
      ...(kind === "json" ? jsonOf(schema) : {}),
      example: kind === "json" ? exampleIn(schema.description) : null,
    };
    if (kind === "integer") field.maximum = Math.min(field.maximum ?? SAFE, SAFE); // more digits would be lost
    return field;
  });
  return fields.sort((a, b) => a.order - b.order);
}

/**
 * Fields in three groups: `main` is what the question is asked with; `settings` have a default that works;
 * `more` may stay empty. Optional ones named in `promoted` stand with the question.
 */
export function groups(fields, promoted = []) {
  const main = fields.filter(
    (field, index) =>
      field.required || (index === 0 && !field.nullable) || (field.nullable && promoted.includes(field.name)),
  );
  const more = fields.filter((field) => field.nullable && !main.includes(field));
  const settings = fields.filter((field) => !main.includes(field) && !more.includes(field));
  return { main, settings, more, settingsOpen: settings.length <= FEW };
}

/** What the control of a field shows for a value of an input. */
export function shown(field, value) {
  if (value === null || value === undefined) return field.kind === "boolean" && !field.nullable ? false : "";
  if (field.kind === "boolean") return field.nullable ? String(value) : Boolean(value);
  if (field.kind === "file") return value;
  if (field.kind === "files") return value;
  if (field.kind === "json" && typeof value !== "string") return JSON.stringify(value, null, 2);
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** The state of all controls, from defaults and, where given, a prediction's input. */
export const filled = (fields, input = {}) =>
  Object.fromEntries(
    fields.map((field) => [field.name, shown(field, field.name in input ? input[field.name] : field.default)]),
  );

/** An input without its secrets, whose place in a stored prediction is taken by a word for them. */
export function withoutSecrets(fields, input) {
  const secrets = fields.filter(({ kind }) => kind === "secret").map(({ name }) => name);
  return Object.fromEntries(Object.entries(input).filter(([name]) => !secrets.includes(name)));
}

/** Whether a control says something else than the model's default. */
export const changed = (field, value) => value !== shown(field, field.default);

function numberOf(field, text) {
  const value = Number(text);
  if (!Number.isFinite(value)) return { problem: "must be a number" };
  if (field.kind === "integer" && !Number.isInteger(value)) return { problem: "must be a whole number" };
  const { minimum: low, maximum: high } = field;
  if (low !== null && value < low) return { problem: `must be at least ${low}` };
  if (high !== null && value > high) return { problem: `must be at most ${high}` };
  return { value };
}

/** One control as the value that is sent, or the problem with it; neither: it is left out. */
export function read(field, shownValue) {
  if (field.kind === "boolean") {
    return shownValue === "" ? {} : { value: shownValue === true || shownValue === "true" };
  }
  if (field.kind === "file" || field.kind === "files") {
    if (shownValue?.length) return { value: shownValue };
    return field.required ? { problem: "choose a file" } : {};
  }
  const text = String(shownValue ?? "");
  if (field.kind === "integer" || field.kind === "number") {
    if (text.trim() === "") return field.nullable ? {} : { problem: "must be a number" };
    return numberOf(field, text);
  }
  if (field.kind === "choice") {
    const value = field.choices.find((choice) => String(choice) === text);
    return value === undefined ? (field.required ? { problem: "choose one" } : {}) : { value };
  }
  if (text === "") {
    if (field.required) return { problem: "is needed" };
    return field.nullable || field.kind === "json" ? {} : { value: "" };
  }
  if (field.kind === "json") {
    const checked = !field.lenient || /^\s*[[{]/.test(text);
    const wrong = checked ? problem(text, field.wanted) : null;
    if (wrong) return { problem: `line ${wrong.line}, column ${wrong.column}: ${wrong.message}`, offset: wrong.offset };
    return { value: field.parsed ? JSON.parse(text) : text };
  }
  const { minLength: low, maxLength: high } = field;
  if (low !== null && text.length < low) return { problem: `must have at least ${low} characters` };
  if (high !== null && text.length > high) return { problem: `may have at most ${high} characters` };
  return { value: text };
}

/**
 * What the whole form sends. Defaults are left out, so that code on screen shows what matters; the first and the
 * required fields are always there.
 */
export function collect(fields, values) {
  const input = {};
  const problems = {};
  fields.forEach((field, index) => {
    const { value, problem: wrong } = read(field, values[field.name]);
    const matters = field.required || changed(field, values[field.name]) || (index === 0 && value !== "");
    if (wrong) problems[field.name] = wrong;
    else if (value !== undefined && matters) input[field.name] = value;
  });
  return { input, problems };
}

/** Whether the model's output arrives in pieces. */
export const streams = (document) => document?.components?.schemas?.Output?.["x-cog-array-type"] === "iterator";
