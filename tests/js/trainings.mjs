// What the official JavaScript client gets of trainings from the playground, as one JSON object on standard output.
import Replicate from "replicate";

const [url, version, data, webhook] = process.argv.slice(2);
const replicate = new Replicate({ baseUrl: `${url}/v1`, auth: "any" });
const found = {};

const asked = { destination: "local/by-js", input: { train_data: data, steps: 2 } };
const made = await replicate.trainings.create("local", "echo", version, {
  ...asked,
  webhook,
  webhook_events_filter: ["completed"],
});
found.made = [made.status, made.model, made.version];

let now = made;
const statuses = new Set([made.status]);
while (!["succeeded", "failed", "canceled"].includes(now.status)) {
  await new Promise((resolve) => setTimeout(resolve, 100));
  now = await replicate.trainings.get(made.id);
  statuses.add(now.status);
}
found.statuses = [...statuses];
found.error = now.error;
found.logs = now.logs;
found.output = await replicate.run(now.output.version, { input: { prompt: "weights", count: 1 } });
found.latest = (await replicate.models.get("local", "by-js")).latest_version.id === now.output.version.split(":")[1];

const long = await replicate.trainings.create("local", "echo", version, { ...asked, input: { ...asked.input, steps: 1000 } });
await replicate.trainings.cancel(long.id);
let canceled = await replicate.trainings.get(long.id);
for (let tries = 0; tries < 200 && ["starting", "processing"].includes(canceled.status); tries++) {
  await new Promise((resolve) => setTimeout(resolve, 100));
  canceled = await replicate.trainings.get(long.id);
}
found.canceled = canceled.status;
found.listed = (await replicate.trainings.list()).results.slice(0, 2).map((one) => one.id);
found.ids = [long.id, made.id];
try {
  await replicate.trainings.create("local", "echo", version, { ...asked, input: {} });
} catch (error) {
  found.refused = [error.response.status, error.message.includes("train_data is required")];
}
console.log(JSON.stringify(found));
