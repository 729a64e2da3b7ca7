// What the colours mean: a bar with its ends in numbers and the unit, two genes' mixture, or labels with their names.

import { blendColour, table } from "./colours.js";
import { element } from "./elements.js";

/** Numbers as the page writes them. */
export function number(value) {
  return Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(2);
}

/** Fill a figure with the legend of a colour map. */
export function scaleLegend(figure, { map, range, unit, title }) {
  const bar = element("canvas");
  bar.width = 256;
  bar.height = 1;
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", `Colours of ${title}: ${map}, from ${number(range[0])} to ${number(range[1])} ${unit}`);
  const context = bar.getContext("2d");
  const colours = table(map);
  const pixels = context.createImageData(256, 1);
  for (let i = 0; i < 256; i++) pixels.data.set([...colours.subarray(3 * i, 3 * i + 3), 255], 4 * i);
  context.putImageData(pixels, 0, 0);
  const ends = element("div", "ends", ...[`≤ ${number(range[0])}`, unit, `≥ ${number(range[1])}`].map(span));
  figure.replaceChildren(bar, ends, element("figcaption", "", `${title}, ${unit}.`));
}

/** Fill a figure with the legend of two genes' mixture. @param genes two of {label, range} */
export function blendLegend(figure, genes, words) {
  const square = element("canvas", "square");
  square.width = square.height = 32;
  square.setAttribute("role", "img");
  square.setAttribute("aria-label", `Mixture: ${genes[0].label} grows to the right in magenta, ${genes[1].label} upwards in green`);
  const context = square.getContext("2d");
  const pixels = context.createImageData(32, 32);
  for (let i = 0; i < 1024; i++) pixels.data.set([...blendColour((i % 32) / 31, 1 - Math.floor(i / 32) / 31), 255], 4 * i);
  context.putImageData(pixels, 0, 0);
  const lines = genes.map(({ label, range }, i) => {
    const swatch = element("span", "swatch");
    swatch.style.background = i ? "rgb(0 255 0)" : "rgb(255 0 255)";
    return element("div", "", swatch, ` ${label}: ${number(range[0])} to ${number(range[1])}`);
  });
  const text = element("figcaption", "", ...lines, `White where both are high. ${words}`);
  figure.replaceChildren(element("div", "blend", square, text));
}

/**
 * Fill a figure with labels that can be hidden.
 * @param items of {label, name, colour as CSS}
 * @param hidden Set of labels
 * @param onToggle called with (label, whether it is shown)
 */
export function labelLegend(figure, { items, hidden, onToggle, words }) {
  const keys = items.map(({ label, name, colour }) => {
    const box = element("input");
    box.type = "checkbox";
    box.checked = !hidden.has(label);
    box.addEventListener("change", () => onToggle(label, box.checked));
    const swatch = element("span", "swatch");
    swatch.style.background = colour;
    return element("label", "key", box, swatch, name);
  });
  // The boxes stay the same while they are used: a new one would lose the keyboard's place.
  if (figure.dataset.items === JSON.stringify(items)) {
    figure.querySelectorAll("input").forEach((box, i) => (box.checked = !hidden.has(items[i].label)));
    return;
  }
  figure.replaceChildren(element("div", "keys", ...keys), element("figcaption", "", words));
  figure.dataset.items = JSON.stringify(items);
}

/** Fill a figure with words alone. */
export function noLegend(figure, words) {
  figure.replaceChildren(element("figcaption", "", words));
}

function span(text) {
  return element("span", "", text);
}
