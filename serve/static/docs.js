// The API's documentation, drawn from openapi.json.

const main = document.getElementById("docs");

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child != null));
  return element;
}

// As much of Markdown as the descriptions use: paragraphs, `code` and fenced blocks.
function prose(text = "") {
  const out = document.createDocumentFragment();
  for (const [number, part] of text.split("```").entries()) {
    if (number % 2) {
      out.append(make("pre", {}, make("code", { textContent: part.trim() })));
      continue;
    }
    for (const paragraph of part.split(/\n\s*\n/).filter((p) => p.trim())) {
      out.append(make("p", {}, ...inline(paragraph)));
    }
  }
  return out;
}

function inline(text) {
  return text.split("`").map((part, n) => (n % 2 ? make("code", { textContent: part }) : part));
}

let document_;

function resolve(schema) {
  const name = schema?.$ref?.split("/").pop();
  return name ? { name, ...document_.components.schemas[name] } : schema ?? {};
}

function kind(schema) {
  const found = resolve(schema);
  if (found.name) return found.name;
  if (found.anyOf) return found.anyOf.map(kind).join(" or ");
  if (found.enum) return found.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (found.const !== undefined) return JSON.stringify(found.const);
  if (found.type === "array") return `list of ${kind(found.items ?? found.prefixItems?.[0])}`;
  return found.format ? `${found.type} (${found.format})` : found.type ?? "any";
}

function table(title, columns, rows) {
  if (!rows.length) return null;
  const head = columns.map((name) => make("th", { scope: "col", textContent: name }));
  return make(
    "table", {},
    make("caption", { textContent: title, className: "quiet" }),
    make("thead", {}, make("tr", {}, ...head)),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, cell))))),
  );
}

function code(text) {
  return make("code", { textContent: text });
}

function operation(path, verb, found) {
  const inputs = (found.parameters ?? []).map((p) => [
    code(p.name),
    p.in,
    code(kind(p.schema)),
    p.description ?? p.schema?.description ?? "",
  ]);
  const bodies = Object.entries(found.requestBody?.content ?? {}).map(([type, media]) => [
    code(type),
    code(kind(media.schema)),
  ]);
  const answers = Object.entries(found.responses).map(([status, answer]) => [
    status,
    make("span", {}, ...inline(answer.description ?? "")),
    Object.keys(answer.content ?? {}).join(", "),
  ]);
  const example = Object.values(found.responses["200"]?.content ?? {}).find((m) => m.example)?.example;
  return make(
    "details",
    { id: found.operationId },
    make("summary", {}, make("span", { className: "verb", textContent: verb.toUpperCase() }), code(path), ` – ${found.summary ?? ""}`),
    prose(found.description),
    table("Parameters", ["Name", "In", "Type", "Meaning"], inputs),
    bodies.length ? prose(found.requestBody.description) : null,
    table("Request bodies", ["Content type", "Type"], bodies),
    table("Responses", ["Status", "Meaning", "Content types"], answers),
    example === undefined ? null : make("pre", {}, code(typeof example === "string" ? example : JSON.stringify(example, null, 2))),
  );
}

function schema(name, found) {
  const rows = Object.entries(found.properties ?? {}).map(([field, value]) => [
    code(field),
    code(kind(value)),
    value.description ?? resolve(value).description ?? "",
  ]);
  return make(
    "details",
    { id: `schema-${name}` },
    make("summary", {}, code(name)),
    prose(found.description),
    table("Fields", ["Name", "Type", "Meaning"], rows),
  );
}

async function draw() {
  document_ = await (await fetch("openapi.json")).json();
  const groups = new Map();
  for (const [path, verbs] of Object.entries(document_.paths)) {
    for (const [verb, found] of Object.entries(verbs)) {
      const tag = found.tags?.[0] ?? "other";
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push(operation(path, verb, found));
    }
  }
  const about = make("section", {}, make("h2", { textContent: `${document_.info.title} ${document_.info.version}` }), prose(document_.info.description));
  const order = ["segmentation", "models", "KServe v2", "health"];
  const sorted = [...groups].sort(([a], [b]) => order.indexOf(a) - order.indexOf(b));
  const parts = sorted.map(([tag, items]) => make("section", {}, make("h2", { textContent: tag }), ...items));
  const schemas = Object.entries(document_.components.schemas).map(([name, found]) => schema(name, found));
  parts.push(make("section", {}, make("h2", { textContent: "Types" }), ...schemas));
  main.replaceChildren(about, ...parts);
  main.ariaBusy = "false";
}

draw().catch((error) => main.replaceChildren(make("p", { className: "wrong", textContent: error.message })));
