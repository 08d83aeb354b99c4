// Downloads the network and runs it, so that the page stays responsive.

import { labels, normalise, place, resize } from "./segmentation.js";

let ort;
let network;
let session;

async function get(address) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(`${address} cannot be read: status ${response.status}.`);
  return response;
}

async function download(address, bytes) {
  const response = await get(address);
  const parts = [];
  let loaded = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    loaded += value.length;
    postMessage({ loaded: loaded / bytes });
  }
  if (loaded !== bytes) throw new Error(`${address} has ${loaded} bytes, expected ${bytes}: it was cut off or replaced.`);
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function start(provider) {
  network = await (await get("network.json")).json();
  postMessage({ network });
  const adapter = provider === "wasm" ? null : await self.navigator.gpu?.requestAdapter().catch(() => null);
  const used = adapter ? "webgpu" : "wasm";
  ort = await import(`./onnxruntime/ort.${used}.bundle.min.mjs`);
  ort.env.wasm.wasmPaths = new URL("onnxruntime/", self.location).href;
  // Threads share memory, which browsers allow only to pages served with COOP and COEP headers.
  if (!self.crossOriginIsolated) ort.env.wasm.numThreads = 1;
  const model = await download("model.onnx", network.bytes);
  session = await ort.InferenceSession.create(model, { executionProviders: [used] }).catch((error) => {
    if (used === "wasm") throw error;
    throw new Error(`${error.message ?? error} Add ?provider=wasm to the address to run on the CPU.`);
  });
  postMessage({ ready: used, threads: used === "wasm" ? ort.env.wasm.numThreads : 0 });
}

// RGBA of an image. A canvas has no colours beneath transparent pixels, which the session takes: of
// an image with such, a texture has.
function read(image) {
  const { width, height } = image;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  if (!data.some((value, at) => value < 255 && at % 4 === 3)) return data;
  const gl = new OffscreenCanvas(1, 1).getContext("webgl2");
  if (!gl || Math.max(width, height) > gl.getParameter(gl.MAX_TEXTURE_SIZE)) {
    throw new Error("The colours of this image's transparent pixels cannot be read here. Save it without transparency.");
  }
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, image);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  const texture = gl.getParameter(gl.TEXTURE_BINDING_2D);
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, data);
  gl.getExtension("WEBGL_lose_context")?.loseContext(); // browsers keep some sixteen
  return data;
}

async function segment(image, number) {
  const size = [image.height, image.width];
  const begin = performance.now();
  const pixels = read(image);
  const covered = place(size, network);
  const input = normalise(resize(pixels, size, covered), covered, network);
  const prepared = performance.now();
  const tensor = new ort.Tensor("float32", input, [1, 3, network.height, network.width]);
  const { logits } = await session.run({ images: tensor });
  const values = await logits.getData();
  const ran = performance.now();
  const found = labels(values, logits.dims.slice(1), network, covered, size);
  const milliseconds = { preprocess: prepared - begin, inference: ran - prepared, postprocess: performance.now() - ran };
  postMessage({ number, labels: found, size, milliseconds }, [found.buffer]);
}

// One after the other: a session runs one input at a time.
let queue = Promise.resolve();
onmessage = ({ data }) => {
  queue = queue
    .then(() => (data.image ? segment(data.image, data.number) : start(data.provider)))
    .catch((error) => postMessage({ number: data.number, error: error.message ?? String(error) }));
};
