// Node's fetch. Arguments: host:port, model, a JSON head and its binary tensor, expected labels.
import { readFileSync } from "node:fs";

const [address, name, ...files] = process.argv.slice(2);
const [head, tensor, labels] = files.map((file) => readFileSync(file));
const model = `http://${address}/v2/models/${name}`;

async function get(address, right) {
  const answer = await fetch(address);
  const body = await answer.json();
  return answer.ok && right(body) ? "ok" : `${answer.status} ${JSON.stringify(body)}`;
}

async function infer() {
  const answer = await fetch(`${model}/infer`, {
    method: "POST",
    headers: { "Inference-Header-Content-Length": head.length },
    body: Buffer.concat([head, tensor]),
  });
  const body = Buffer.from(await answer.arrayBuffer());
  const right = answer.ok && body.subarray(-labels.length).equals(labels);
  return right ? "ok" : `${answer.status} and other labels`;
}

const cells = {
  health: await get(`http://${address}/v2/health/ready`, (body) => body.ready),
  metadata: await get(model, (body) => body.inputs[0].name === "images"),
  infer: await infer(),
  config: await get(`${model}/config`, (body) => body.max_batch_size > 0),
  statistics: await get(`${model}/stats`, (body) => body.model_stats[0].inference_count > 0),
};
console.log(JSON.stringify({ version: process.versions.node, cells }));
