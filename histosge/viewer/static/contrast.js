// Contrast: the values' histogram with the colours under it, and the least and the highest value that they span, by two
// handles or two numbers.

import { finite, table } from "./colours.js";
import { find } from "./elements.js";

const BINS = 64;
const BAR_PX = 10;

export class Contrast {
  /** @param onChange called with [low, high], or null for automatic limits */
  constructor(onChange) {
    this.onChange = onChange;
    this.canvas = find("histogram");
    this.content = null;
    for (const id of ["lowest", "highest"]) find(id).addEventListener("change", () => this.typed());
    find("auto").addEventListener("click", () => onChange(null));
    this.canvas.addEventListener("pointerdown", (event) => this.grab(event));
    this.canvas.addEventListener("pointermove", (event) => this.grabbed !== undefined && this.drag(event));
    this.canvas.addEventListener("pointerup", () => this.release());
    new ResizeObserver(() => this.paint()).observe(this.canvas);
  }

  /**
   * Show values and limits.
   * @param found lists of values, the first drawn as bars, others as lines; empty for none
   * @param range [low, high], or null
   * @param map name of the colour map
   */
  show(found, range, map) {
    find("contrast").hidden = !range;
    if (!range) return;
    const kept = found.map(finite).filter((values) => values.length);
    // Not Math.min(...values): of very many values it is more arguments than a call takes.
    const low = kept.reduce((least, values) => values.reduce((a, b) => Math.min(a, b), least), range[0]);
    const high = kept.reduce((most, values) => values.reduce((a, b) => Math.max(a, b), most), range[1]);
    const counts = kept.map((values) => histogram(values, low, high));
    this.content = { counts, low, high, range: [...range], map };
    this.write();
    this.paint();
  }

  write() {
    const { range } = this.content;
    const [low, high] = range.map((value) => rounded(value, range[1] - range[0]));
    find("lowest").value = low;
    find("highest").value = high;
  }

  typed() {
    const range = [Number(find("lowest").value), Number(find("highest").value)];
    // Nonsense is put back, and an empty field is nonsense.
    if (find("lowest").value === "" || find("highest").value === "" || !(range[1] > range[0])) return this.write();
    this.onChange(range);
  }

  valueAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const { low, high } = this.content;
    return low + Math.max(0, Math.min(1, (event.clientX - box.left) / box.width)) * (high - low);
  }

  grab(event) {
    if (!this.content) return;
    const value = this.valueAt(event);
    const [low, high] = this.content.range;
    this.grabbed = Math.abs(value - low) < Math.abs(value - high) ? 0 : 1;
    this.canvas.setPointerCapture(event.pointerId);
    this.drag(event);
  }

  drag(event) {
    const { range, low, high } = this.content;
    const least = (high - low) / 200; // the two never meet
    const value = this.valueAt(event);
    range[this.grabbed] = this.grabbed ? Math.max(value, range[0] + least) : Math.min(value, range[1] - least);
    this.write();
    this.paint();
  }

  release() {
    if (this.grabbed === undefined) return;
    this.grabbed = undefined;
    this.onChange([...this.content.range]);
  }

  paint() {
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    if (!this.content || !width) return;
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(document.documentElement);
    const [ink, quiet, accent] = ["--ink", "--border", "--accent"].map((name) => style.getPropertyValue(name));
    const { counts, range, low, high, map } = this.content;
    const x = (value) => ((value - low) / (high - low)) * width;
    const room = height - BAR_PX;
    counts.forEach((bins, i) => paintBins(context, bins, width, room, i ? ink : quiet, i > 0));
    const colours = table(map);
    for (let px = 0; px < width; px++) {
      const value = low + ((px + 0.5) / width) * (high - low);
      const entry = Math.round(Math.max(0, Math.min(1, (value - range[0]) / (range[1] - range[0]))) * 255);
      context.fillStyle = `rgb(${colours[3 * entry]} ${colours[3 * entry + 1]} ${colours[3 * entry + 2]})`;
      context.fillRect(px, room, 1, BAR_PX);
    }
    for (const value of range) {
      context.fillStyle = accent;
      const at = Math.max(1.5, Math.min(width - 1.5, x(value)));
      context.fillRect(at - 1.5, 0, 3, height);
      context.beginPath();
      context.arc(Math.max(6, Math.min(width - 6, at)), room, 6, 0, 2 * Math.PI);
      context.fill();
    }
  }
}

function histogram(values, low, high) {
  const bins = new Array(BINS).fill(0);
  for (const value of values) bins[Math.min(BINS - 1, Math.floor(((value - low) / (high - low || 1)) * BINS))]++;
  return bins;
}

/** Bars, or a line; heights by the square root of counts, as zeros of counts hide everything else. */
function paintBins(context, bins, width, height, colour, asLine) {
  const most = Math.sqrt(Math.max(...bins));
  const step = width / bins.length;
  const tops = bins.map((count) => height - (Math.sqrt(count) / most) * (height - 3));
  context.fillStyle = context.strokeStyle = colour;
  context.lineWidth = 1.5;
  if (!asLine) return tops.forEach((top, i) => context.fillRect(i * step, top, step - 0.5, height - top));
  context.beginPath();
  tops.forEach((top, i) => context.lineTo((i + 0.5) * step, top));
  context.stroke();
}

/** As many digits as a colour's width needs, so that a number near 0 does not fill the field with its digits. */
function rounded(value, span) {
  return Number(value.toFixed(Math.max(0, 3 - Math.floor(Math.log10(span)))));
}
