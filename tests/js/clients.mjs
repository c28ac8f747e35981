// What the official JavaScript client gets from the playground, as one JSON object on standard output.
import Replicate, { validateWebhook } from "replicate";

const [url, version] = process.argv.slice(2);
const replicate = new Replicate({ baseUrl: `${url}/v1`, auth: process.env.REPLICATE_API_TOKEN });
const found = {};

const input = { prompt: "js", count: 3 };
found.run = await replicate.run("local/echo", { input });
found.runVersion = await replicate.run(`local/echo:${version}`, { input });
const statuses = [];
found.poll = await replicate.run(
  "local/echo",
  { input: { ...input, delay: 0.3 }, wait: { mode: "poll", interval: 100 } },
  (one) => statuses.push(one.status),
);
found.statuses = [...new Set(statuses)];

found.stream = [];
for await (const event of replicate.stream("local/echo", { input: { prompt: "a\nb", count: 2 } })) {
  found.stream.push([event.event, event.data]);
}
try {
  for await (const _ of replicate.stream("local/echo", { input: { prompt: "fail" } }));
} catch (error) {
  found.streamError = error.message;
}
try {
  await replicate.run("local/echo", { input: { prompt: "fail" } });
} catch (error) {
  found.runError = error.message;
}
try {
  await replicate.run("local/echo", { input: { count: 0 } });
} catch (error) {
  found.refused = [error.response.status, error.message.includes("less than the minimum")];
}

const long = await replicate.predictions.create({ version, input: { count: 1000, delay: 0.05 } });
found.canceled = (await replicate.predictions.cancel(long.id)).status;
found.get = (await replicate.predictions.get(long.id)).status;
const made = await replicate.predictions.create({ model: "local/echo", input });
found.waited = (await replicate.wait(made, { interval: 50 })).output;
let count = 0;
for await (const page of replicate.paginate(replicate.predictions.list)) count += page.length;
found.listed = count;

const file = await replicate.files.create(new Blob(["from a file"]), { a: 1 });
found.file = [file.size, file.metadata];
found.fileRun = await replicate.run("local/echo", { input: { file: new Blob(["blob"]), count: 1 } });
found.fileDeleted = await replicate.files.delete(file.id);

found.models = (await replicate.models.list()).results.map((one) => one.name);
found.model = (await replicate.models.get("local", "echo")).latest_version.id;
found.versions = (await replicate.models.versions.list("local", "echo")).results.length;
found.version = (await replicate.models.versions.get("local", "echo", version)).id;
found.account = (await replicate.accounts.current()).username;

const { key } = await replicate.webhooks.default.secret.get();
if (process.env.WEBHOOK) {
  const { id, timestamp, body, signature } = JSON.parse(process.env.WEBHOOK);
  found.webhook = await validateWebhook({ id, timestamp, body, signature, secret: key });
  found.forged = await validateWebhook({ id, timestamp, body: body + " ", signature, secret: key });
}
console.log(JSON.stringify(found));
