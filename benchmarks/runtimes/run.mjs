// One .onnx file in ONNX Runtime's Node.js or web build: node run.mjs PACKAGE MODEL FOLDER.
//
// Run by `python -m benchmarks.runtimes` in a folder whose node_modules holds the package. FOLDER
// holds scene*.json, inputs by name with their shape and the file of their numbers, and gets
// answer*.json, outputs likewise.

import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";

const [name, model, folder] = process.argv.slice(2);
const ort = createRequire(join(process.cwd(), "x.js"))(name);

// A bundle's weights, by the name that its graph calls them.
const weights = join(dirname(model), "weights.bin");
const external = readdirSync(dirname(model)).includes("weights.bin")
  ? [{ path: basename(weights), data: new Uint8Array(readFileSync(weights)) }]
  : [];
const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(model)), {
  executionProviders: [name === "onnxruntime-web" ? "wasm" : "cpu"],
  externalData: external,
  logSeverityLevel: 4,
});
for (const scene of readdirSync(folder).filter((file) => /^scene.*\.json$/.test(file))) {
  const feeds = {};
  for (const [input, { file, shape }] of Object.entries(JSON.parse(readFileSync(join(folder, scene))))) {
    const bytes = readFileSync(join(folder, file));
    feeds[input] = new ort.Tensor("float32", new Float32Array(new Uint8Array(bytes).buffer), shape);
  }
  const answers = {};
  for (const [output, tensor] of Object.entries(await session.run(feeds))) {
    const file = `${scene.replace("scene", "answer")}.${output}.bin`;
    writeFileSync(join(folder, file), new Uint8Array(tensor.data.buffer, tensor.data.byteOffset, tensor.data.byteLength));
    answers[output] = { file, shape: tensor.dims, type: tensor.type };
  }
  writeFileSync(join(folder, scene.replace("scene", "answer")), JSON.stringify(answers));
}
process.exit(0);
