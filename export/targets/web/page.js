// The page: takes an image, gives it to the worker, draws the classes over it.
// ?provider=wasm leaves the GPU alone.

const $ = (id) => document.getElementById(id);
const worker = new Worker("worker.js", { type: "module" });
let network;
let shown;
let last = 0; // the number of the image that is on the page

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

function describe() {
  const facts = {
    Network: network.name,
    Input: `${network.height} × ${network.width} pixels, ${network.fit}`,
    Classes: network.classes.length,
    "Runs by": `onnxruntime-web ${network.onnxruntime_web}`,
  };
  const entries = Object.entries(facts).flatMap(([name, value]) => {
    const [term, detail] = [document.createElement("dt"), document.createElement("dd")];
    [term.textContent, detail.textContent] = [name, value];
    return [term, detail];
  });
  $("facts").replaceChildren(...entries);
}

async function choose(file) {
  if (!file) return;
  const number = ++last;
  let image;
  try {
    // Pixels as they are in the file, upright as its EXIF says.
    const asStored = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
    image = await createImageBitmap(file, { ...asStored, imageOrientation: "from-image" });
  } catch {
    if (number === last) say(`${file.name} is no image that this browser can decode. Save it as PNG or JPEG.`, true);
    return;
  }
  if (number !== last) return image.close();
  say("Segmenting …");
  for (const canvas of [$("image"), $("mask")]) [canvas.width, canvas.height] = [image.width, image.height];
  $("image").getContext("2d").drawImage(image, 0, 0);
  $("mask").hidden = true;
  $("legend").replaceChildren();
  $("times").textContent = "";
  $("download").removeAttribute("href");
  $("answer").hidden = false;
  worker.postMessage({ image, number }, [image]);
}

function show({ labels, size, milliseconds }) {
  shown = { labels, size };
  const [height, width] = size;
  const context = $("mask").getContext("2d");
  const pixels = context.createImageData(width, height);
  const counts = new Uint32Array(network.classes.length);
  const colours = new Uint32Array(pixels.data.buffer); // little-endian: ABGR
  const table = network.palette.map(([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0);
  labels.forEach((label, at) => {
    counts[label]++;
    colours[at] = table[label];
  });
  context.putImageData(pixels, 0, 0);
  $("mask").hidden = false;
  const present = [...counts.entries()].filter(([, count]) => count).sort(([, a], [, b]) => b - a);
  $("legend").replaceChildren(
    ...present.map(([label, count]) => {
      const [entry, swatch] = [document.createElement("li"), document.createElement("span")];
      swatch.className = "swatch";
      swatch.style.setProperty("background", `rgb(${network.palette[label].join(" ")})`);
      entry.append(swatch, `${network.classes[label]} ${((100 * count) / labels.length).toFixed(1)} %`);
      return entry;
    }),
  );
  const total = Object.values(milliseconds).reduce((sum, each) => sum + each, 0);
  const stages = Object.entries(milliseconds).map(([name, each]) => `${name} ${each.toFixed(0)} ms`);
  $("times").textContent = stages.join(", ");
  const number = last;
  $("mask").toBlob((blob) => {
    if (number !== last) return;
    URL.revokeObjectURL($("download").href);
    $("download").href = URL.createObjectURL(blob);
  });
  say(`Done: ${present.length} classes, ${total.toFixed(0)} ms.`);
}

worker.onmessage = ({ data }) => {
  if (data.number !== undefined && data.number !== last) return; // of an image that was replaced
  if (data.error) {
    say(data.error, true);
    $("progress").hidden = true;
  }
  if (data.network) {
    network = data.network;
    describe();
  }
  if (data.loaded !== undefined) {
    $("progress").value = data.loaded;
    say(`Downloading the network: ${Math.round(100 * data.loaded)} % of ${(network.bytes / 1e6).toFixed(1)} MB`);
  }
  if (data.ready) {
    $("progress").hidden = true;
    $("file").disabled = false;
    say(`Ready, on ${data.ready === "webgpu" ? "the GPU" : `the CPU with ${data.threads || "several"} thread(s)`}.`);
  }
  if (data.labels) show(data);
};
worker.onerror = (event) => say(event.message || "The page's files cannot be read. Is the folder served over HTTP?", true);

// For those who look over the page's shoulder: what is shown, as numbers.
globalThis.segmented = () => shown;

$("opacity").addEventListener("input", () => $("mask").style.setProperty("opacity", $("opacity").value / 100));
$("mask").style.setProperty("opacity", $("opacity").value / 100);
$("file").addEventListener("change", () => choose($("file").files[0]));
for (const [kind, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", over);
    if (kind === "drop" && !$("file").disabled) choose(event.dataTransfer.files[0]);
  });
}
worker.postMessage({ provider: new URLSearchParams(location.search).get("provider") });
