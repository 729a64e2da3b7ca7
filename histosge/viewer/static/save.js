// What is seen as a figure: SVG with the slide and the map as pictures, spots, outlines, bars and words as shapes and text;
// and the same as PNG.

import { fileName, find, saveFile } from "./elements.js";
import { SpotLayer } from "./layers.js";
import { namePlace, scaleBar } from "./panel.js";

const SVG = "http://www.w3.org/2000/svg";
const FINER = 2; // pixels of the figure per pixel of the screen
const MARGIN = 16;
const LINE_PX = 13; // of the legend's words
const TITLE_PX = 44;
const FONT = "system-ui, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif";
const MAX_SHAPES = 20000; // spots: more become a picture

/** Save what is seen as SVG. */
export async function saveSvg(shown, panels, genes) {
  const { text } = makeFigure(shown, panels, genes);
  saveFile(nameOf(shown, genes, "svg"), text, "image/svg+xml");
}

/** Save what is seen as PNG. */
export async function savePng(shown, panels, genes) {
  const { text, width, height } = makeFigure(shown, panels, genes);
  const address = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
  try {
    const image = new Image();
    image.src = address;
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = width * FINER;
    canvas.height = height * FINER;
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
    saveFile(nameOf(shown, genes, "png"), blob, "image/png");
  } finally {
    URL.revokeObjectURL(address);
  }
}

function nameOf({ slide }, genes, kind) {
  return `${fileName(slide.id, ...genes)}.${kind}`;
}

/** @param genes names of what is coloured, for the title */
function makeFigure(shown, panels, genes) {
  const seen = ["measured", "predicted"].filter((name) => panels[name].host.clientWidth);
  const sizes = seen.map((name) => panels[name].view());
  const width = sizes.reduce((sum, size) => sum + size.width + MARGIN, MARGIN);
  const svg = shape(null, "svg", {});
  const ground = shape(svg, "rect", { width, fill: "#ffffff" });
  const training = shown.layer?.training ? ` (${shown.layer.training})` : "";
  words(svg, MARGIN, 20, [`${shown.slide.id}${training}`, ...genes].join(" · "), { "font-size": 15, "font-weight": 600 });
  let [left, height] = [MARGIN, 0];
  seen.forEach((name, i) => {
    const group = shape(svg, "g", { transform: `translate(${left} ${TITLE_PX})` });
    words(group, 0, -6, find(`${name}-title`).textContent, { "font-size": 12 });
    drawView(group, panels[name], sizes[i], `view-${i}`);
    const top = sizes[i].height + 8;
    const legend = drawLegend(shape(group, "g", { transform: `translate(0 ${top})` }), find(`${name}-legend`), sizes[i].width);
    // As high as its legends are: many domains, or long words, take more lines.
    height = Math.max(height, TITLE_PX + top + legend + MARGIN);
    left += sizes[i].width + MARGIN;
  });
  for (const [name, value] of Object.entries({ width, height, viewBox: `0 0 ${width} ${height}` })) svg.setAttribute(name, value);
  ground.setAttribute("height", height);
  return { text: new XMLSerializer().serializeToString(svg), width, height };
}

function drawView(group, panel, view, id) {
  const { width, height } = view;
  shape(shape(group, "clipPath", { id }), "rect", { width, height });
  const inner = shape(group, "g", { "clip-path": `url(#${id})` });
  drawBackdrop(inner, panel, view);
  const opacity = panel.opacity;
  const { layer } = panel;
  if (layer instanceof SpotLayer && layer.order.length <= MAX_SHAPES) drawSpots(shape(inner, "g", { opacity }), layer, view);
  else if (layer) shape(inner, "image", { width, height, opacity, href: layerPicture(layer, view) });
  for (const region of panel.regions) drawRegion(inner, region, view);
  const bar = scaleBar(view.scale);
  if (bar) {
    shape(inner, "rect", { x: 6, y: height - 34, width: Math.max(bar.long, 56) + 12, height: 28, fill: "#ffffff", "fill-opacity": 0.85 });
    words(inner, 12, height - 19, bar.words, { "font-size": 12, "font-weight": 600 });
    shape(inner, "rect", { x: 12, y: height - 14, width: bar.long, height: 3, fill: "#111111" });
  }
  shape(group, "rect", { width, height, fill: "none", stroke: "#7d8894" });
}

/** The slide as the view shows it, at the screen's resolution. */
function drawBackdrop(group, panel, { width, height }) {
  const { canvas } = panel.viewer.drawer;
  if (canvas.style.visibility === "hidden") return;
  const copy = document.createElement("canvas");
  copy.width = canvas.width;
  copy.height = canvas.height;
  const context = copy.getContext("2d");
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, copy.width, copy.height);
  context.filter = canvas.style.filter || "none";
  context.drawImage(canvas, 0, 0);
  shape(group, "image", { width, height, href: copy.toDataURL("image/jpeg", 0.92) });
}

/** A layer at twice the screen's resolution. */
function layerPicture(layer, view) {
  const canvas = document.createElement("canvas");
  canvas.width = view.width * FINER;
  canvas.height = view.height * FINER;
  const context = canvas.getContext("2d");
  context.scale(FINER, FINER);
  layer.draw(context, view);
  return canvas.toDataURL("image/png");
}

function drawSpots(group, layer, view) {
  const r = Math.max(1.5, layer.radius_um * view.scale);
  for (const i of layer.order) {
    const [cx, cy] = [0, 1].map((axis) => (axis ? view.top : view.left) + layer.spots.xy_um[i][axis] * view.scale);
    const isOutside = cx < -r || cy < -r || cx > view.width + r || cy > view.height + r;
    if (isOutside || !layer.colours[i]) continue;
    const rim = layer.outline ? { stroke: "#ffffff", "stroke-width": short(Math.min(1.2, r / 5)) } : {};
    shape(group, "circle", { cx: short(cx), cy: short(cy), r: short(r), fill: cssHex(layer.colours[i]), ...rim });
  }
}

function drawRegion(group, { polygons, colour, name }, view) {
  const x = (um) => short(view.left + um * view.scale);
  const y = (um) => short(view.top + um * view.scale);
  const d = polygons.flat().map((ring) => `M${ring.map((corner) => `${x(corner[0])} ${y(corner[1])}`).join("L")}Z`).join("");
  for (const [stroke, width] of [["#ffffff", 5], [colour, 2.5]]) {
    shape(group, "path", { d, fill: "none", stroke, "stroke-width": width, "stroke-linejoin": "round" });
  }
  const rim = { stroke: "#ffffff", "stroke-width": 3, "paint-order": "stroke" };
  const [left, base] = namePlace(polygons, view, name.length * 7);
  words(group, short(left), short(base), name, { "font-size": 12, "font-weight": 600, ...rim });
}

/** The legend as the page shows it: its bar and ends, its labels, and its words. Returns its height. */
function drawLegend(group, figure, width) {
  const bar = figure.querySelector("canvas");
  let top = 0;
  if (bar) {
    const isSquare = bar.classList.contains("square");
    const size = isSquare ? { width: 44, height: 44 } : { width, height: 10 };
    shape(group, "image", { ...size, preserveAspectRatio: "none", href: bar.toDataURL("image/png") });
    top = isSquare ? 0 : 22;
  }
  const ends = [...figure.querySelectorAll(".ends span")].map((span) => span.textContent);
  ends.forEach((text, i) => {
    const anchor = ["start", "middle", "end"][i];
    words(group, [0, width / 2, width][i], top, text, { "font-size": 11, "text-anchor": anchor });
  });
  if (ends.length) top += 16;
  let left = bar?.classList.contains("square") ? 52 : 0;
  for (const key of figure.querySelectorAll(".key")) {
    if (!key.querySelector("input").checked) continue;
    const long = key.textContent.length * 6.2 + 24;
    if (left + long > width) [left, top] = [0, top + 15];
    shape(group, "rect", { x: left, y: top + 2, width: 10, height: 10, fill: cssHex(key.querySelector(".swatch").style.background) });
    words(group, left + 14, top + 11, key.textContent, { "font-size": 11 });
    left += long;
  }
  if (figure.querySelector(".key")) [left, top] = [0, top + 28];
  let base = Math.max(top, 11);
  const write = (line, x = left) => {
    words(group, x, base, line, { "font-size": 11, fill: "#4a5460" });
    base += LINE_PX;
  };
  const caption = figure.querySelector("figcaption");
  // Lines of their own say which colour is which gene; all other words flow.
  for (const line of caption?.querySelectorAll(":scope > div") ?? []) {
    shape(group, "rect", { x: left, y: base - 9, width: 10, height: 10, fill: cssHex(line.querySelector(".swatch").style.background) });
    write(line.textContent.trim(), left + 14);
  }
  const rest = [...(caption?.childNodes ?? [])].filter((node) => node.nodeName !== "DIV").map((node) => node.textContent);
  for (const line of wrapped(rest.join("").trim(), (width - left) / 5.8)) write(line);
  return Math.max(base, bar?.classList.contains("square") ? 44 : 0);
}

/** Lines of at most so many letters. */
function wrapped(text, letters) {
  const lines = [""];
  for (const word of text.split(" ")) {
    const longer = `${lines[lines.length - 1]} ${word}`.trim();
    if (longer.length > letters && lines[lines.length - 1]) lines.push(word);
    else lines[lines.length - 1] = longer;
  }
  return lines;
}

function shape(parent, name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent?.append(made);
  return made;
}

/** Text of any letters: XMLSerializer writes what would be markup as what it is, text. */
function words(parent, x, y, text, attributes = {}) {
  const made = shape(parent, "text", { x, y, "font-family": FONT, fill: "#14181d", ...attributes });
  made.textContent = text;
  return made;
}

function short(value) {
  return Math.round(value * 100) / 100;
}

/** A colour as every program reads it: few know the newer way of writing rgb(). */
function cssHex(colour) {
  const parts = colour.match(/\d+/g).slice(0, 3).map(Number);
  return `#${parts.map((part) => part.toString(16).padStart(2, "0")).join("")}`;
}
