// The page: an image goes to the server, its mask comes back and is laid over it.

import { classRows, paintBoxes, paintMasks, word } from "./instances.js";

const $ = (id) => document.getElementById(id);
const state = { models: [], answer: null, labels: null, hidden: new Set(), request: 0 };

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function headers(more = {}) {
  const key = $("key").value;
  return key ? { ...more, "X-API-Key": key } : more;
}

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

async function problem(response) {
  const found = await response.json().catch(() => ({}));
  return found.detail || `The service answered with status ${response.status}.`;
}

async function loadModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) {
    $("key-field").hidden = false;
    say("This service asks for an API key.");
    return;
  }
  if (!response.ok) throw new Error(await problem(response));
  const chosen = $("model").value;
  state.models = (await response.json()).models;
  $("model").replaceChildren(
    ...state.models.map((m) => make("option", { value: m.name, textContent: m.name })),
  );
  if (state.models.some((m) => m.name === chosen)) $("model").value = chosen;
  showCard();
}

const chosenCard = () => state.models.find((m) => m.name === $("model").value);

function showCard() {
  const card = chosenCard();
  if (!card) return;
  const parity = Math.max(...card.parity.map((p) => p.max_rel));
  const rows = {
    Name: card.name,
    State: card.state,
    Input: `${card.input.height} × ${card.input.width} pixels, ${card.mode}, ${card.fit}`,
    Classes: String(card.classes.length),
    ...(card.instances && {
      Objects: `${card.instances.most} at most, ${card.instances.masks ? "with masks" : "boxes alone"}`,
    }),
    Precision: card.precision,
    Backend: card.backend ?? "not loaded yet",
    "Batch sizes": card.batch_sizes.join(", "),
    "Time per run here": card.benchmark.map((b) => `${b.milliseconds} ms (batch ${b.batch})`).join(", ") || "–",
    "Largest error at export": card.parity.length ? parity.toExponential(1) + " of the largest value" : "–",
    Checkpoint: card.checkpoint ?? "–",
    Exported: `${card.created_at.slice(0, 10)} by ${card.created_by}`,
  };
  $("card").replaceChildren(
    ...Object.entries(rows).flatMap(([name, value]) => [
      make("dt", { textContent: name }),
      make("dd", { textContent: value }),
    ]),
  );
}

async function loadSamples() {
  const { samples } = await (await fetch("samples")).json();
  const box = document.querySelector(".samples");
  for (const [number, name] of samples.entries()) {
    const picture = make("img", { src: `samples/${name}`, alt: `Sample scene ${number + 1}` });
    const button = make("button", { type: "button", ariaPressed: "false" }, picture);
    button.addEventListener("click", async () => {
      press(button);
      await segment(await (await fetch(`samples/${name}`)).blob());
    });
    box.append(button);
  }
  $("samples").hidden = samples.length === 0;
}

function press(button) {
  for (const other of document.querySelectorAll(".samples button")) {
    other.ariaPressed = String(other === button);
  }
}

async function segment(blob) {
  const mine = ++state.request;
  say("Segmenting …");
  const name = $("model").value;
  let address = name ? `v1/models/${encodeURIComponent(name)}/segment` : "v1/segment";
  // All objects are asked for; which are shown is chosen here.
  if (chosenCard()?.kind === "detector") address += "?min_score=0";
  let response;
  try {
    response = await fetch(address, {
      method: "POST",
      body: blob,
      headers: headers({
        "Content-Type": blob.type.startsWith("image/") ? blob.type : "application/octet-stream",
        Accept: "application/json",
      }),
    });
  } catch {
    say("The service cannot be reached. Is it still running?", true);
    return;
  }
  if (mine !== state.request) return; // another image was chosen meanwhile
  if (!response.ok) {
    if (response.status === 401) $("key-field").hidden = false;
    say(await problem(response), true);
    return;
  }
  const timing = response.headers.get("Server-Timing") ?? "";
  state.answer = await response.json();
  state.labels = state.answer.instances ? null : decode(state.answer.mask);
  state.hidden.clear();
  await show(blob, timing);
}

function decode({ size, counts, values }) {
  const labels = new Uint16Array(size[0] * size[1]);
  let at = 0;
  for (const [run, count] of counts.entries()) {
    labels.fill(values[run], at, at + count);
    at += count;
  }
  return labels;
}

async function show(blob, timing) {
  const { width, height } = state.answer;
  $("answer").hidden = false;
  $("boxes").hidden = $("score-field").hidden = state.labels !== null;
  $("share-title").textContent = state.labels ? "Area" : "Objects";
  for (const id of ["image", "mask"]) Object.assign($(id), { width, height });
  const context = $("image").getContext("2d");
  try {
    // Drawn to the answer's size; the browser applies EXIF orientation as the service does.
    const bitmap = await createImageBitmap(blob);
    context.drawImage(bitmap, 0, 0, width, height);
    bitmap.close();
  } catch {
    context.clearRect(0, 0, width, height); // a format the browser cannot draw (TIFF)
  }
  showTimes(timing);
  const count = showClasses();
  const stages = [...$("times").rows].at(-1).cells[1].textContent;
  say(`Done: ${count} classes, ${stages} ms in the service.`);
}

const minScore = () => $("score").value / 100;

// The classes in words and as the legend, and everything painted; gives how many there are.
function showClasses() {
  const { width, height, classes } = state.answer;
  const present = state.labels
    ? classes.filter((c) => c.area > 0).sort((a, b) => b.area - a.area)
    : classRows(state.answer, minScore());
  const words = present.map((c) => (state.labels ? `${c.name} ${percent(c.share)}` : `${c.count} ${c.name}`));
  $("mask-words").textContent = `${width} × ${height} pixels: ${words.join(", ") || "no object"}.`;
  showLegend(present);
  paint();
  return present.length;
}

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

function showLegend(present) {
  $("legend").replaceChildren(
    ...present.map((entry) => {
      const box = make("input", { type: "checkbox", checked: !state.hidden.has(entry.id) });
      box.addEventListener("change", () => {
        state.hidden[box.checked ? "delete" : "add"](entry.id);
        paint();
      });
      const swatch = make("span", { className: "swatch" });
      swatch.style.setProperty("background", `rgb(${entry.color.join(" ")})`);
      const label = make("label", {}, box, swatch, entry.name);
      const share = state.labels
        ? [make("meter", { value: entry.share, min: 0, max: 1, ariaHidden: "true" }), percent(entry.share)]
        : [String(entry.count)];
      const pixels = state.labels ? entry.area : entry.pixels;
      return make(
        "tr", {},
        make("td", {}, label),
        make("td", { className: "number" }, ...share),
        make("td", { className: "number", textContent: pixels.toLocaleString("en") }),
      );
    }),
  );
}

function showTimes(timing) {
  const stages = timing.split(",").map((part) => {
    const [name, rest] = part.trim().split(";dur=");
    return [name, Number(rest)];
  });
  stages.push(["total", stages.reduce((sum, [, ms]) => sum + ms, 0)]);
  $("times").replaceChildren(
    ...stages.map(([name, ms]) =>
      make(
        "tr", {},
        make("td", { textContent: name }),
        make("td", { className: "number", textContent: ms.toFixed(1) }),
      ),
    ),
  );
}

function paint() {
  const { width, height, classes } = state.answer;
  const context = $("mask").getContext("2d");
  const pixels = context.createImageData(width, height);
  const words = new Uint32Array(pixels.data.buffer); // little-endian: ABGR
  if (state.labels) {
    const table = new Uint32Array(classes.length);
    for (const { id, color } of classes) if (!state.hidden.has(id)) table[id] = word(color);
    for (let at = 0; at < words.length; at++) words[at] = table[state.labels[at]];
  } else {
    paintMasks(words, state.answer, state.hidden, minScore());
    paintBoxes($("boxes"), state.answer, state.hidden, minScore());
  }
  context.putImageData(pixels, 0, 0);
  $("mask").toBlob((blob) => {
    const link = $("download");
    if (link.href) URL.revokeObjectURL(link.href);
    link.href = URL.createObjectURL(blob);
  });
}

function setOpacity() {
  $("mask").style.setProperty("opacity", $("opacity").value / 100);
  $("percent").textContent = `${$("opacity").value} %`;
}

$("opacity").addEventListener("input", setOpacity);
$("score").addEventListener("input", () => {
  $("least").textContent = minScore().toFixed(2);
  showClasses();
});
$("model").addEventListener("change", showCard);
$("key").addEventListener("change", () => loadModels().catch((e) => say(e.message, true)));
$("file").addEventListener("change", () => {
  press(null);
  if ($("file").files.length) segment($("file").files[0]);
});
for (const kind of ["dragenter", "dragover"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  press(null);
  if (event.dataTransfer.files.length) segment(event.dataTransfer.files[0]);
});
setOpacity();
loadModels().catch((error) => say(error.message, true));
loadSamples().catch(() => {});
