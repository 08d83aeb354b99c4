// A detector's answer on the page: masks out of COCO's run lengths, boxes with names on top.

const RUN_BITS = 5;

// COCO's characters to run lengths down the columns: groups of five bits, lowest first, each
// number but the first three relative to the one before the last.
export function decompress(text) {
  const counts = [];
  for (let at = 0; at < text.length; ) {
    let value = 0;
    let shift = 0;
    let group;
    do {
      group = text.charCodeAt(at++) - 48;
      value += (group & 31) * 2 ** shift;
      shift += RUN_BITS;
    } while (group & 32);
    if (group & 16) value -= 2 ** shift;
    if (counts.length > 2) value += counts.at(-2);
    counts.push(value);
  }
  return counts;
}

// Paint a mask into (height × width) words, one colour.
function fill(words, { size: [height, width], counts }, colour) {
  let at = 0;
  for (const [run, count] of decompress(counts).entries()) {
    if (run % 2) {
      for (let place = at; place < at + count; place++) {
        words[(place % height) * width + Math.floor(place / height)] = colour;
      }
    }
    at += count;
  }
}

export const word = ([red, green, blue]) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;

// The instances that are shown: of ticked classes, from a score on.
export function shown(answer, hidden, minScore) {
  return answer.instances.filter((one) => one.score >= minScore && !hidden.has(one.label));
}

// Masks, the best score on top.
export function paintMasks(words, answer, hidden, minScore) {
  const colours = new Map(answer.classes.map((entry) => [entry.id, word(entry.color)]));
  for (const one of shown(answer, hidden, minScore).reverse()) {
    if (one.mask) fill(words, one.mask, colours.get(one.label));
  }
}

// Boxes with class and score, the best score on top. The canvas is finer than a small image, so
// that words can be read; coordinates are the image's.
export function paintBoxes(canvas, answer, hidden, minScore) {
  const { width, height } = answer;
  const fineness = Math.max(1, Math.ceil(1200 / Math.max(width, height)));
  Object.assign(canvas, { width: width * fineness, height: height * fineness }); // and clears it
  const context = canvas.getContext("2d");
  context.scale(fineness, fineness);
  const colours = new Map(answer.classes.map((entry) => [entry.id, entry.color]));
  const letters = Math.max(width, height) / 50;
  const margin = letters / 4;
  context.font = `${letters}px system-ui, sans-serif`;
  context.textBaseline = "top";
  context.lineWidth = letters / 8;
  for (const one of shown(answer, hidden, minScore).reverse()) {
    const [x1, y1, x2, y2] = one.box;
    const colour = colours.get(one.label);
    const [red, green, blue] = colour;
    const text = `${one.class} ${one.score.toFixed(2)}`;
    const wide = context.measureText(text).width + 2 * margin;
    const high = letters + margin;
    const left = Math.max(0, Math.min(x1, width - wide));
    const top = y1 >= high ? y1 - high : Math.max(0, y1);
    context.strokeStyle = context.fillStyle = `rgb(${colour.join(" ")})`;
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    context.fillRect(left, top, wide, high);
    context.fillStyle = 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#000" : "#fff";
    context.fillText(text, left + margin, top + margin / 2);
  }
}

// The legend's rows: every class that occurs, its objects and their pixels.
export function classRows(answer, minScore) {
  const found = shown(answer, new Set(), minScore);
  return answer.classes
    .map((entry) => {
      const own = found.filter((one) => one.label === entry.id);
      const pixels = own.reduce((sum, one) => sum + (one.area ?? 0), 0);
      return { ...entry, count: own.length, pixels };
    })
    .filter((entry) => entry.count)
    .sort((a, b) => b.count - a.count);
}
