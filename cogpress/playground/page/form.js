// Derive a form from a model's OpenAPI schema: its fields, groups and validation, and the input that it sends. Does not
// touch the DOM.

import { problem } from "./json.js";

// More settings than this start folded, with the changed ones named in the heading.
const FEW = 4;
const SAFE = Number.MAX_SAFE_INTEGER;

const resolve = (schema, document) => {
  const reference = schema?.$ref ?? schema?.allOf?.find((part) => part.$ref)?.$ref;
  if (!reference) return schema;
  const target = reference.replace(/^#\//, "").split("/").reduce((node, key) => node?.[key], document);
  return { ...target, ...schema, title: schema.title ?? target?.title };
};

/** A title in sentence case: "Max Tokens" becomes "Max tokens"; acronyms stay. */
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

/** What kind of JSON a field expects, from its description, and whether it takes plain text too. */
function jsonOf(schema) {
  const words = schema.description ?? "";
  if (schema.type === "array") return { wanted: "list", lenient: false, parsed: true };
  if (schema.type === "object") return { wanted: "object", lenient: false, parsed: true };
  if (schema.type !== "string") return { wanted: "any", lenient: false, parsed: true };
  const wanted = /JSON list/.test(words) ? "list" : /JSON (object|schema)/.test(words) ? "object" : "any";
  return { wanted, lenient: /several as a JSON/i.test(words), parsed: false };
}

/** The first JSON in a description, as an example. */
export function exampleIn(description) {
  const start = (description ?? "").search(/[[{]/);
  if (start < 0) return null;
  for (let end = description.length; end > start + 2; end--) {
    const part = description.slice(start, end);
    if (/[\]}]$/.test(part) && !problem(part)) return part;
  }
  return null;
}

/** A model's inputs as fields, in its order. */
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
      lines: kind === "text" && /One per line/.test(schema.description ?? ""),
      example: kind === "json" ? exampleIn(schema.description) : null,
    };
    if (kind === "integer") field.maximum = Math.min(field.maximum ?? SAFE, SAFE); // larger ones lose digits
    return field;
  });
  return fields.sort((a, b) => a.order - b.order);
}

/**
 * Fields in three groups: `main` for the question, `settings` with defaults, and `more` for optional ones. Optional
 * fields named in `promoted` join `main`, and so do those of the model's own template, beside which a text that starts
 * empty is optional.
 */
export function groups(fields, promoted = [], own = []) {
  const main = fields.filter(
    (field, index) =>
      field.required ||
      own.includes(field.name) ||
      (index === 0 && !field.nullable) ||
      (field.nullable && promoted.includes(field.name)),
  );
  const optional = (field) => field.nullable || (own.length > 0 && field.kind === "text" && field.default === "");
  const more = fields.filter((field) => optional(field) && !main.includes(field));
  const settings = fields.filter((field) => !main.includes(field) && !more.includes(field));
  return { main, settings, more, settingsOpen: settings.length <= FEW };
}

/** What a field's control shows for an input value. */
export function shown(field, value) {
  if (value === null || value === undefined) return field.kind === "boolean" && !field.nullable ? false : "";
  if (field.kind === "boolean") return field.nullable ? String(value) : Boolean(value);
  if (field.kind === "file") return value;
  if (field.kind === "files") return value;
  if (field.kind === "json" && typeof value !== "string") return JSON.stringify(value, null, 2);
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** The state of all controls, from defaults and optionally a prediction's input. */
export const filled = (fields, input = {}) =>
  Object.fromEntries(
    fields.map((field) => [field.name, shown(field, field.name in input ? input[field.name] : field.default)]),
  );

/** An input without its secrets, which a stored prediction has only as a placeholder. */
export function withoutSecrets(fields, input) {
  const secrets = fields.filter(({ kind }) => kind === "secret").map(({ name }) => name);
  return Object.fromEntries(Object.entries(input).filter(([name]) => !secrets.includes(name)));
}

/** Whether a control differs from the model's default. */
export const changed = (field, value) => value !== shown(field, field.default);

function numberOf(field, text) {
  const value = Number(text);
  if (!Number.isFinite(value)) return { problem: "must be a number" };
  if (field.kind === "integer" && !Number.isInteger(value)) return { problem: "must be an integer" };
  const { minimum: low, maximum: high } = field;
  if (low !== null && value < low) return { problem: `must be at least ${low}` };
  if (high !== null && value > high) return { problem: `must be at most ${high}` };
  return { value };
}

/** A control's value to send, or the problem with it; neither if it is left out. */
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
    if (field.required) return { problem: "is required" };
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
  if (high !== null && text.length > high) return { problem: `must have at most ${high} characters` };
  return { value: text };
}

/**
 * The input that the form sends, and its problems. Defaults are left out, so that generated code shows what matters;
 * the first field and required ones are always included.
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

/** Whether the model's output is streamed. */
export const streams = (document) => document?.components?.schemas?.Output?.["x-cog-array-type"] === "iterator";
