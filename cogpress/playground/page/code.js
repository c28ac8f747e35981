// Generate programs that send the current input and run as pasted. Every value goes through one of the literal
// functions below; the token is read from the environment and never part of the text.

import { escapeUnseen } from "./text.js";

/** JSON with invisible characters escaped; also a JavaScript literal. */
const json = (value, indent = 2) => escapeUnseen(JSON.stringify(value, null, indent));

/** A secret input, which the program reads from an environment variable. */
class Secret {
  constructor(field) {
    this.variable = field.replace(/[^A-Za-z0-9]+/g, "_").toUpperCase();
  }
}

const lines = (open, items, close, indent, deeper) =>
  items.length ? `${open}\n${items.map((item) => `${deeper}${item},\n`).join("")}${indent}${close}` : open + close;

/** A Python literal. JSON strings are valid in Python; its words and brackets are translated. */
export function python(value, indent = "") {
  if (value instanceof Secret) return `os.environ["${value.variable}"]`;
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value === "number") return String(value);
  if (typeof value === "string") return json(value);
  const deeper = `${indent}    `;
  if (Array.isArray(value)) return lines("[", value.map((item) => python(item, deeper)), "]", indent, deeper);
  const items = Object.entries(value).map(([key, item]) => `${json(key)}: ${python(item, deeper)}`);
  return lines("{", items, "}", indent, deeper);
}

/** A JavaScript literal. */
export function javascript(value, indent = "") {
  if (value instanceof Secret) return `process.env.${value.variable}`;
  if (value === null || typeof value !== "object") return json(value ?? null);
  const deeper = `${indent}  `;
  if (Array.isArray(value)) return lines("[", value.map((item) => javascript(item, deeper)), "]", indent, deeper);
  // A plain "__proto__" would set the object's prototype instead of a key.
  const name = (key) => (key === "__proto__" ? '["__proto__"]' : /^[A-Za-z_$][\w$]*$/.test(key) ? key : json(key));
  const items = Object.entries(value).map(([key, item]) => `${name(key)}: ${javascript(item, deeper)}`);
  return lines("{", items, "}", indent, deeper);
}

/** An argument for a POSIX shell. */
export const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/**
 * A JSON body as a here-document, which needs no shell quoting: no line can equal the end marker, because JSON writes
 * line breaks in strings as \n.
 */
function heredoc(body) {
  const secrets = [];
  const text = json(JSON.parse(JSON.stringify(body, (_, value) => {
    if (!(value instanceof Secret)) return value;
    secrets.push(value);
    return `\u{f8ff}${value.variable}\u{f8ff}`;
  })));
  if (!secrets.length) return `<<'JSON'\n${text}\nJSON`;
  // The shell expands the text only if there is a secret to insert, so only then it is escaped.
  const escaped = text.replace(/[\\$`]/g, "\\$&");
  const put = (all, { variable }) => all.replace(`\u{f8ff}${variable}\u{f8ff}`, `\${${variable}}`);
  return `<<JSON\n${secrets.reduce(put, escaped)}\nJSON`;
}

const AUTHORIZATION = `-H "Authorization: Bearer $REPLICATE_API_TOKEN"`;

function curl({ base, version, input }) {
  return `curl --silent --show-error ${shell(`${base}/v1/predictions`)} \\
  ${AUTHORIZATION} \\
  -H "Content-Type: application/json" \\
  -H "Prefer: wait" \\
  --data-binary @- ${heredoc({ version, input })}
`;
}

function http({ base, version, input }) {
  return `stream=$(curl --silent --show-error ${shell(`${base}/v1/predictions`)} \\
  ${AUTHORIZATION} \\
  -H "Content-Type: application/json" \\
  --data-binary @- ${heredoc({ version, input, stream: true })}
)
stream=$(printf '%s' "$stream" | python3 -c 'import json, sys; print(json.load(sys.stdin)["urls"]["stream"])')
curl --silent --no-buffer -H "Accept: text/event-stream" "$stream"
`;
}

function pythonClient({ base, reference, input, streaming }) {
  const imports = hasSecret(input) ? "import os\n\n" : "";
  const call = `\n    ${python(reference)},\n    input=${python(input, "    ")},\n`;
  const use = streaming
    ? `for event in client.stream(${call}):\n    print(event, end="", flush=True)\nprint()\n`
    : `output = client.run(${call})\nprint(output)\n`;
  return `# pip install replicate; the token is read from REPLICATE_API_TOKEN\n${imports}import replicate

client = replicate.Client(base_url=${python(base)})

${use}`;
}

function javascriptClient({ base, reference, input, streaming }) {
  const call = `${javascript(reference)}, {\n  input: ${javascript(input, "  ")},\n}`;
  const use = streaming
    ? `for await (const event of replicate.stream(${call})) {\n  process.stdout.write(String(event));\n}\n` +
      "console.log();\n"
    : `const output = await replicate.run(${call});\nconsole.log(output);\n`;
  return `// npm install replicate; the token is read from REPLICATE_API_TOKEN. Save as answer.mjs.
import Replicate from "replicate";

const replicate = new Replicate({ baseUrl: ${javascript(`${base}/v1`)} });

${use}`;
}

// Inputs that OpenAI's API has under the same name.
const SAME = ["max_tokens", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty"];

/**
 * Map a model's inputs to OpenAI's API: the route, OpenAI's own parameters, and the rest for extra_body. Fields of a
 * prompt template are not a conversation, so they use the completions route.
 */
export function asOpenai(input) {
  const own = {};
  const rest = { ...input };
  const take = (name, as = (value) => ({ [name]: value })) => {
    if (rest[name] !== undefined && rest[name] !== "") Object.assign(own, as(rest[name]));
    delete rest[name];
  };
  const chat = input.fields === undefined || input.messages !== undefined;
  if (chat) {
    const { prompt, system_prompt: system } = input;
    const said = parsed(input.messages) ?? [{ role: "user", content: prompt ?? "" }];
    own.messages = system && said[0]?.role !== "system" ? [{ role: "system", content: system }, ...said] : said;
    for (const name of ["messages", "prompt", "system_prompt"]) delete rest[name];
    take("tools", (text) => ({ tools: parsed(text) ?? text }));
    take("json_schema", (text) => ({
      response_format: { type: "json_schema", json_schema: { name: "answer", schema: parsed(text) ?? text } },
    }));
    take("logprobs", (top) => ({ logprobs: true, top_logprobs: top }));
  } else {
    own.prompt = input.prompt ?? "";
    delete rest.prompt;
    take("logprobs");
  }
  for (const name of SAME) take(name);
  take("stop", (text) => ({ stop: parsed(text) ?? text }));
  return { chat, own, rest };
}

function parsed(text) {
  if (typeof text !== "string" || !/^\s*[[{]/.test(text)) return null;
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function openai({ base, reference, input }) {
  const { chat, own, rest } = asOpenai(input);
  const extra = Object.keys(rest).length ? { extra_body: rest } : {};
  const all = Object.entries({ model: reference, ...own, ...extra });
  const [route, piece] = chat ? ["chat.completions", "delta.content"] : ["completions", "text"];
  return `# pip install openai; the token is read from REPLICATE_API_TOKEN
import os

from openai import OpenAI

client = OpenAI(base_url=${python(`${base}/v1`)}, api_key=os.environ.get("REPLICATE_API_TOKEN") or "none")

stream = client.${route}.create(
${all.map(([name, value]) => `    ${name}=${python(value, "    ")},`).join("\n")}
    stream=True,
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].${piece} or "", end="", flush=True)
print()
`;
}

const hasSecret = (input) => Object.values(input).some((value) => value instanceof Secret);

/** Languages in the order of their tabs. */
export const LANGUAGES = [
  { id: "python", label: "Python", write: pythonClient },
  { id: "javascript", label: "JavaScript", write: javascriptClient },
  { id: "curl", label: "curl", write: curl },
  { id: "http", label: "HTTP stream", write: http },
  { id: "openai", label: "OpenAI client", write: openai },
];

/**
 * The program for an input.
 *
 * @param language an id of LANGUAGES
 * @param request base (this server's address), owner, name, version, input, streaming, secrets (names of inputs)
 */
export function program(language, { base, owner, name, version, input, streaming = true, secrets = [] }) {
  const shown = Object.fromEntries(
    Object.entries(input).map(([key, value]) => [key, secrets.includes(key) ? new Secret(key) : value]),
  );
  const { write } = LANGUAGES.find(({ id }) => id === language);
  return write({ base, version, input: shown, streaming, reference: `${owner}/${name}:${version}` });
}
