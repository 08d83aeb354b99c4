// From an image's pixels to the network's input, and from its logits to each pixel's class, with the
// arithmetic of fdconv_deploy.runtime: preprocessing.py and postprocessing.py say why each step is so.

const scaled = (length, factor) => Math.max(1, Math.trunc(length * factor + 0.5));

const padded = (size, divisor) => size.map((length) => Math.ceil(length / divisor) * divisor);

// How large an image [height, width] lies in the network's input, at its top left.
export function place(size, network) {
  const { height, width, fit, scale, keep_ratio, size_divisor } = network;
  const same = (other) => other[0] === height && other[1] === width;
  const within = Math.min(height / size[0], width / size[1]);
  const inside = [Math.min(scaled(size[0], within), height), Math.min(scaled(size[1], within), width)];
  let published = size;
  if (scale && keep_ratio) {
    const factor = Math.min(Math.max(...scale) / Math.max(...size), Math.min(...scale) / Math.min(...size));
    published = [scaled(size[0], factor), scaled(size[1], factor)];
  } else if (scale) {
    published = [scale[1], scale[0]];
  }
  if (size_divisor > 1 && same(padded(published, size_divisor))) return published;
  if (same(inside) || same(published) || fit === "stretch") return [height, width];
  return inside;
}

// Where OpenCV's bilinear resize reads along one axis, and by which shares, in 1/2048.
function taps(from, to, clamped) {
  const ratio = from / to;
  const first = new Int32Array(to);
  const second = new Int32Array(to);
  const shares = new Int32Array(2 * to);
  const limit = (at) => Math.min(Math.max(at, 0), from - 1);
  for (let i = 0; i < to; i++) {
    let position = Math.fround((i + 0.5) * ratio - 0.5);
    let at = Math.floor(position);
    let share = Math.fround(position - at);
    if (clamped && (at < 0 || at >= from - 1)) [at, share] = [limit(at), 0];
    first[i] = limit(at);
    second[i] = limit(at + 1);
    shares[2 * i] = even(Math.fround(Math.fround(1 - share) * 2048));
    shares[2 * i + 1] = even(Math.fround(share * 2048));
  }
  return { first, second, shares };
}

// Rounded to the nearest integer, halves to even ones.
function even(value) {
  const down = Math.floor(value);
  const over = value - down;
  return over > 0.5 || (over === 0.5 && down % 2) ? down + 1 : down;
}

// RGBA of [h, w] to RGB of [height, width], to the bit what cv2.resize makes of 8-bit pixels.
export function resize(pixels, [h, w], [height, width]) {
  const out = new Uint8ClampedArray(height * width * 3);
  if (h === height && w === width) {
    for (let o = 0; o < out.length; o++) out[o] = pixels[4 * Math.trunc(o / 3) + (o % 3)];
    return out;
  }
  const columns = taps(w, width, true);
  const rows = taps(h, height, false);
  const kept = new Map(); // rows of the image, resized along their length
  const row = (y) => {
    if (!kept.has(y)) {
      if (kept.size > 3) kept.delete(kept.keys().next().value);
      const line = new Int32Array(width * 3);
      for (let x = 0; x < width; x++) {
        const [left, right] = [4 * (y * w + columns.first[x]), 4 * (y * w + columns.second[x])];
        for (let c = 0; c < 3; c++) {
          line[3 * x + c] = pixels[left + c] * columns.shares[2 * x] + pixels[right + c] * columns.shares[2 * x + 1];
        }
      }
      kept.set(y, line);
    }
    return kept.get(y);
  };
  for (let y = 0; y < height; y++) {
    const [above, below] = [row(rows.first[y]), row(rows.second[y])];
    const [a, b] = [rows.shares[2 * y], rows.shares[2 * y + 1]];
    for (let i = 0; i < width * 3; i++) {
      out[y * width * 3 + i] = (((a * (above[i] >> 4)) >> 16) + ((b * (below[i] >> 4)) >> 16) + 2) >> 2;
    }
  }
  return out;
}

// RGB of [h, w] to the network's input: (3, height, width) float32, zeros where nothing lies.
export function normalise(rgb, [h, w], { height, width, mean, std, reversed }) {
  const input = new Float32Array(3 * height * width);
  for (let c = 0; c < 3; c++) {
    const [centre, spread] = [Math.fround(mean[c]), Math.fround(std[c])];
    const table = Float32Array.from({ length: 256 }, (_, v) => Math.fround(v - centre) / spread);
    const from = reversed ? 2 - c : c;
    for (let y = 0; y < h; y++) {
      for (let x = 0; x < w; x++) {
        input[(c * height + y) * width + x] = table[rgb[3 * (y * w + x) + from]];
      }
    }
  }
  return input;
}

// Bilinear interpolation along one axis, at the positions that torch's float32 arithmetic has.
function bilinear(from, to, alignCorners) {
  return Array.from({ length: to }, (_, i) => {
    if (from === to) return [[i, 1]];
    let position;
    if (alignCorners) {
      position = to > 1 ? Math.fround(Math.fround((from - 1) / (to - 1)) * i) : 0;
    } else {
      position = Math.max(Math.fround(Math.fround(from / to) * (i + 0.5) - 0.5), 0);
    }
    const left = Math.min(Math.trunc(position), from - 1);
    const share = Math.fround(position - left);
    return [[left, 1 - share], [Math.min(left + 1, from - 1), share]];
  });
}

// One map after another: for each output, what it reads of the first one's input and by which
// shares, as many places for all.
function after(second, first) {
  const maps = second.map((reads) => {
    const found = new Map();
    for (const [at, share] of reads) {
      for (const [from, part] of first[at]) found.set(from, (found.get(from) ?? 0) + share * part);
    }
    return [...found].sort(([a], [b]) => a - b);
  });
  const reads = Math.max(...maps.map((map) => map.length));
  const index = new Int32Array(maps.length * reads);
  const share = new Float64Array(maps.length * reads);
  maps.forEach((map, i) => map.forEach(([from, part], t) => {
    index[i * reads + t] = from;
    share[i * reads + t] = part;
  }));
  return { reads, index, share };
}

// Logits (classes, h, w) to the class of each pixel of an image [height, width]: resized to the
// network's input, cut to what the image covers of it, resized to the image; then the highest.
export function labels(logits, [classes, h, w], network, covered, [height, width]) {
  const align = network.align_corners;
  const rows = after(bilinear(covered[0], height, align), bilinear(h, network.height, align));
  const columns = after(bilinear(covered[1], width, align), bilinear(w, network.width, align));
  const out = new Uint16Array(height * width);
  const line = new Float64Array(classes * w);
  for (let y = 0; y < height; y++) {
    line.fill(0);
    for (let t = y * rows.reads; t < (y + 1) * rows.reads; t++) {
      for (let c = 0; c < classes; c++) {
        const from = (c * h + rows.index[t]) * w;
        for (let x = 0; x < w; x++) line[c * w + x] += rows.share[t] * logits[from + x];
      }
    }
    for (let x = 0; x < width; x++) {
      let best = -Infinity;
      for (let c = 0; c < classes; c++) {
        let sum = 0;
        for (let t = x * columns.reads; t < (x + 1) * columns.reads; t++) {
          sum += columns.share[t] * line[c * w + columns.index[t]];
        }
        if (classes === 1) out[y * width + x] = sum > network.threshold_logit ? 1 : 0;
        else if (sum > best) [best, out[y * width + x]] = [sum, c];
      }
    }
  }
  return out;
}
