// What OpenAI's JavaScript client and the AI SDK get from a server, as one JSON object on standard output.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, embed, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";

const [baseURL, apiKey, model] = process.argv.slice(2);
const say = (texts, more = {}) => JSON.stringify({ say: texts, ...more });
const user = (content) => [{ role: "user", content }];
const call = '{"name": "weather", "arguments": {"city": "Köln"}}';
const pieces = [call.slice(0, 15), call.slice(15, 40), call.slice(40)];
const city = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };

async function refused(promise) {
  try {
    await promise;
  } catch (error) {
    return [error.status ?? error.statusCode, error.code ?? error.data?.error?.code, error.message];
  }
}

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const functions = [
  { type: "function", function: { name: "weather", parameters: city } },
  { type: "function", function: { name: "now" } },
];
const create = (content, more = {}) => client.chat.completions.create({ model, messages: user(content), ...more });
const streamed = [];
for await (const chunk of await create(say(["a\u2028", "🎈"]), { stream: true })) {
  streamed.push(chunk.choices[0].delta.content ?? "");
}
const required = { tools: functions, tool_choice: "required" };
const helped = client.chat.completions.stream({
  model,
  messages: user(say(pieces, { delay: 0.05 })),
  ...required,
});
const deltas = [];
helped.on("tool_calls.function.arguments.delta", (event) => deltas.push(event.arguments_delta));
const final = (await helped.finalChatCompletion()).choices[0];
const runner = client.chat.completions.runTools({
  model,
  messages: user(say(['<tool_call>{"name": "now", "arguments": {}}</tool_call>'])),
  tools: [{ type: "function", function: { name: "now", function: () => say(["noon"]), parameters: {} } }],
});
const openai = {
  text: (await create(say(["a", "b"]))).choices[0].message.content,
  streamed: streamed.join(""),
  required: (await create(say([call]), required)).choices[0].message.tool_calls[0].function,
  deltas,
  final: [final.finish_reason, JSON.parse(final.message.tool_calls[0].function.arguments)],
  tools: await runner.finalContent(),
  models: (await client.models.list()).data.map((one) => one.id),
  responses: await refused(client.responses.create({ model, input: "x" })),
  embeddings: await refused(client.embeddings.create({ model, input: "x" })),
};

const provider = createOpenAICompatible({
  name: "kit",
  baseURL,
  apiKey,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const chat = { model: provider(model), maxRetries: 0 };
const tools = {
  weather: tool({ inputSchema: jsonSchema(city) }),
  now: tool({
    inputSchema: jsonSchema({ type: "object", properties: {} }),
    execute: async () => ({ say: ["noon"] }),
  }),
};
const written = streamText({ ...chat, prompt: say(["a", "b"]) });
let text = "";
for await (const part of written.textStream) text += part;
const stepped = await generateText({
  ...chat,
  prompt: say(['<tool_call>{"name": "now", "arguments": {}}</tool_call>']),
  tools,
  stopWhen: stepCountIs(2),
});
const calling = streamText({ ...chat, prompt: say(pieces, { delay: 0.05 }), tools, toolChoice: "required" });
const parts = [];
for await (const part of calling.fullStream) parts.push(part.type);
const ai = {
  text,
  usage: (await written.usage).outputTokens,
  steps: [stepped.steps.length, stepped.text],
  parts,
  called: (await calling.toolCalls)[0].input,
  output: (
    await generateText({ ...chat, prompt: say(['{"city": "Köln"}']), output: Output.object({ schema: jsonSchema(city) }) })
  ).output,
  told: JSON.parse((await generateText({ ...chat, system: "First.", prompt: '{"tell": true}', tools })).text),
  openai: (await generateText({ ...chat, model: createOpenAI({ baseURL, apiKey }).chat(model), prompt: say(["a", "b"]) })).text,
  refused: await refused(generateText({ ...chat, prompt: JSON.stringify({ refuse: "Not this." }) })),
  embedding: await refused(embed({ model: provider.textEmbeddingModel(model), value: "x", maxRetries: 0 })),
};
console.log(JSON.stringify({ openai, ai }));
