// What the colours mean: a bar with its ends in numbers and the unit, or the domains with their numbers.

import { domainColour, table } from "./colours.js";

/** Numbers as the page writes them. */
export function number(value) {
  return Math.abs(value) >= 100 ? value.toFixed(0) : value.toFixed(2);
}

/** Fill a figure with the legend of a colour map. */
export function scaleLegend(figure, { map, range, unit, title }) {
  const bar = document.createElement("canvas");
  bar.width = 256;
  bar.height = 1;
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", `Colours of ${title}: ${map}, from ${number(range[0])} to ${number(range[1])} ${unit}`);
  const context = bar.getContext("2d");
  const colours = table(map);
  const pixels = context.createImageData(256, 1);
  for (let i = 0; i < 256; i++) pixels.data.set([...colours.subarray(3 * i, 3 * i + 3), 255], 4 * i);
  context.putImageData(pixels, 0, 0);
  const middle = (range[0] + range[1]) / 2;
  const ends = element("div", "ends", ...[`≤ ${number(range[0])}`, number(middle), `≥ ${number(range[1])}`].map(span));
  figure.replaceChildren(bar, ends, element("figcaption", "", `${title}, ${unit}.`));
}

/** Fill a figure with the legend of domains. */
export function domainLegend(figure, count) {
  const items = Array.from({ length: count }, (_, label) => {
    const swatch = element("span", "swatch");
    swatch.style.background = `rgb(${domainColour(label).join(" ")})`;
    return element("span", "key", swatch, `domain ${label}`);
  });
  figure.replaceChildren(element("div", "keys", ...items), element("figcaption", "", "Spatial domains"));
}

/** Fill a figure with words alone. */
export function noLegend(figure, words) {
  figure.replaceChildren(element("figcaption", "", words));
}

function span(text) {
  return element("span", "", text);
}

function element(name, kind, ...children) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  made.append(...children);
  return made;
}
