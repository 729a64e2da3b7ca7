// The page: what is chosen, what is read for it, and what the two views then draw.

import { NAMES, robustRange } from "./colours.js";
import { document_, labels, values } from "./data.js";
import { PatchLayer, SpotLayer, labelColour, scaleColour } from "./layers.js";
import { domainLegend, noLegend, number, scaleLegend } from "./legend.js";
import { Panel, link } from "./panel.js";
import { GeneSearch } from "./search.js";

const POLL_MS = 1500;
const find = (id) => document.getElementById(id);
const shown = { slides: [], slide: null, layer: null, spots: null, gene: null, names: [], ask: 0, opened: 0 };
const panels = {};
let search;

async function begin() {
  panels.measured = new Panel(find("measured"), "Slide with measured spots", look);
  panels.predicted = new Panel(find("predicted"), "Slide with the prediction", look);
  link(panels.measured, panels.predicted);
  search = new GeneSearch(find("gene"), find("genes"), pick);
  find("map").replaceChildren(...NAMES.map((name) => new Option(name)));
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (NAMES.includes(wanted.get("map"))) find("map").value = wanted.get("map");
  listen();
  const index = await document_("data/index.json");
  document.title = `${index.title} · histosge`;
  shown.slides = index.slides;
  find("slide").replaceChildren(...index.slides.map((id, i) => new Option(id, i)));
  const first = Math.max(0, index.slides.indexOf(wanted.get("slide")));
  find("slide").value = first;
  const missing = wanted.has("slide") && !index.slides.includes(wanted.get("slide"));
  await openSlide(first, wanted.get("gene"), missing ? wanted.get("slide") : null);
}

function listen() {
  find("controls").addEventListener("submit", (event) => event.preventDefault());
  find("slide").addEventListener("change", (event) => guarded(openSlide(Number(event.target.value), shown.gene)));
  find("layer").addEventListener("change", (event) => guarded(openLayer(Number(event.target.value)).then(draw)));
  for (const id of ["map", "scale", "show"]) find(id).addEventListener("change", () => guarded(draw()));
  find("layout").addEventListener("change", arrange);
  find("opacity").addEventListener("input", fade);
  find("previous").addEventListener("click", () => step(-1));
  find("next").addEventListener("click", () => step(1));
  find("zoom-in").addEventListener("click", () => leading().zoom(1.5));
  find("zoom-out").addEventListener("click", () => leading().zoom(1 / 1.5));
  find("home").addEventListener("click", () => leading().home());
  fade();
}

function guarded(work) {
  return work.catch((error) => {
    document.body.dataset.state = "failed";
    note("error", error.message);
  });
}

// ---------------------------------------------------------------- a slide

/** @param missing the slide that a link names and that is not here, if so */
async function openSlide(n, gene, missing = null) {
  const opened = ++shown.opened;
  const base = `data/${n}`;
  document.body.dataset.state = "loading";
  notes.clear();
  const slide = await document_(`${base}/slide.json`);
  if (opened !== shown.opened) return;
  Object.assign(shown, { slide, base, layer: null, spots: null, gene: null, wanted: gene, chosen: false });
  slide.notes.forEach((text, i) => note(`slide ${i}`, text));
  if (missing !== null) note("link", `The link names slide ${missing}, which is not in this store; ${slide.id} is shown.`);
  for (const panel of Object.values(panels)) panel.setLayer(null);
  const thumbnails = Promise.all(Object.values(panels).map((panel) => panel.open(slide, base)));
  thumbnails.then(() => mark("thumbnail"));
  guarded(openPicture(opened, base));
  if (slide.spots) guarded(openSpots(opened, base));
  find("layer").replaceChildren(...slide.layers.map((key, i) => new Option(key, i)));
  find("layer-field").hidden = slide.layers.length < 2;
  find("layout").value = !slide.spots ? "predicted" : "both";
  find("layout").disabled = !slide.spots || !slide.layers.length;
  if (slide.spots && !slide.layers.length) find("layout").value = "measured";
  arrange();
  find("predicted-title").textContent = "Slide";
  if (slide.layers.length) await openLayer(0);
  if (opened !== shown.opened) return;
  listGenes();
  await thumbnails;
  const start = shown.names.includes(gene) ? gene : shown.names[0];
  // While spots are still read, they may have it.
  if (gene && !shown.names.includes(gene) && !(slide.spots && !shown.spots)) noteGene(gene);
  if (start) await chooseGene(start);
  else await draw();
}

function noteGene(gene) {
  note("gene", `${gene} is neither predicted nor measured on this slide.`);
}

/** Lay the H&E's tiles over the thumbnail as soon as the slide is open; say so where it cannot be. */
async function openPicture(opened, base) {
  note("picture", "");
  for (;;) {
    const picture = await document_(`${base}/picture.json`);
    if (opened !== shown.opened) return;
    if (picture.state === "ready") {
      note("picture", "");
      await Promise.all(Object.values(panels).map((panel) => panel.addPicture(picture, base)));
      document.body.dataset.picture = "tiles";
      await leading().sharp();
      mark("sharp");
      return;
    }
    document.body.dataset.picture = "thumbnail";
    if (picture.state === "absent") {
      note("picture", `The slide itself cannot be read (${picture.reason}). Its thumbnail is shown instead, one pixel per patch.`);
      return;
    }
    note("picture", `The slide is not ready yet (${picture.reason}). Its thumbnail is shown meanwhile.`);
    await new Promise((done) => setTimeout(done, POLL_MS));
  }
}

async function openSpots(opened, base) {
  noLegend(find("measured-legend"), "reading the measured spots …");
  const spots = await document_(`${base}/spots.json`);
  if (opened !== shown.opened) return;
  if (spots.error) {
    note("spots", `Measured spots: ${spots.error}.`);
    noLegend(find("measured-legend"), "no measured spots");
    return;
  }
  spots.column = new Map(spots.genes.map((name, i) => [name, i]));
  shown.spots = spots;
  listGenes();
  // A gene that was asked for before it was known: only the spots have it.
  const late = !shown.chosen && shown.wanted !== shown.gene && spots.column.has(shown.wanted);
  if (shown.wanted && !shown.names.includes(shown.wanted)) noteGene(shown.wanted);
  if (late) await chooseGene(shown.wanted);
  else if (shown.gene) await draw();
  else if (shown.names.length && !shown.slide.layers.length) await chooseGene(shown.names[0]);
}

async function openLayer(n) {
  const base = `${shown.base}/layers/${n}`;
  const opened = shown.opened;
  const layer = await document_(`${base}/layer.json`);
  if (opened !== shown.opened) return;
  layer.base = base;
  layer.column = new Map(layer.genes.map((name, i) => [name, i]));
  shown.layer = layer;
  note("layer", layer.note ?? "");
  note("training", layer.caveat ?? "");
  find("predicted-title").textContent = layer.genes.length ? "Predicted, every patch" : "Slide";
  find("show").querySelector("[value=domains]").disabled = !layer.domains;
  if (!layer.domains) find("show").value = "gene";
  else if (!layer.genes.length) find("show").value = "domains";
  listGenes();
}

function listGenes() {
  const predicted = shown.layer?.column ?? new Map();
  const measured = shown.spots?.column ?? new Map();
  shown.names = [...predicted.keys(), ...[...measured.keys()].filter((name) => !predicted.has(name))];
  search.setGenes(
    shown.names.map((name) => {
      const kinds = [measured.has(name) && "measured", predicted.has(name) && "predicted"].filter(Boolean);
      const trust = shown.layer?.trust?.[predicted.get(name)];
      return { name, note: kinds.join(", ") + (trust == null ? "" : `, trust ${number(trust)}`) };
    }),
  );
  find("gene").disabled = !shown.names.length;
  find("previous").disabled = find("next").disabled = shown.names.length < 2;
}

// ---------------------------------------------------------------- a gene

function step(by) {
  const at = shown.names.indexOf(shown.gene);
  pick(shown.names[(at + by + shown.names.length) % shown.names.length]);
}

/** Take a gene that a person chose. */
function pick(name) {
  shown.chosen = true;
  return chooseGene(name);
}

function chooseGene(name) {
  mark("gene-asked");
  if (name === shown.wanted || shown.chosen) note("gene", "");
  if (shown.gene !== null && find("show").value === "domains" && shown.layer?.genes.length) find("show").value = "gene";
  shown.gene = name;
  search.show(name);
  return guarded(draw());
}

/** Read what is chosen and draw it; of several calls only the last one draws. */
async function draw() {
  const ask = ++shown.ask;
  const { gene, layer, spots, base } = shown;
  document.body.dataset.state = "loading";
  const [predicted, measured, domains, strata] = await Promise.all([
    layer?.column.has(gene) ? values(`${layer.base}/genes/${layer.column.get(gene)}.f16`) : null,
    spots?.column.has(gene) ? values(`${base}/spots/${spots.column.get(gene)}.f16`) : null,
    layer && find("show").value === "domains" ? labels(`${layer.base}/domains.i16`) : null,
    layer?.strata ? labels(`${layer.base}/strata.i16`) : null,
  ]);
  if (ask !== shown.ask) return;
  const own = { measured: measured && robustRange(measured), predicted: predicted && robustRange(predicted) };
  const shared = find("scale").value === "shared" ? (own.measured ?? own.predicted) : null;
  drawMeasured(measured, shared ?? own.measured);
  if (domains) drawDomains(domains);
  else drawPredicted(predicted, strata, shared ?? own.predicted);
  describeGene();
  remember();
  document.body.dataset.gene = gene ?? "";
  document.body.dataset.state = "ready";
  mark("gene-drawn");
}

function drawMeasured(found, range) {
  const legend = find("measured-legend");
  if (!found || !range) {
    panels.measured.setLayer(null);
    if (shown.spots) noLegend(legend, shown.gene ? `${shown.gene} was not measured` : "no gene is chosen");
    return;
  }
  const map = find("map").value;
  const say = (value) => `${shown.gene} ${number(value)}`;
  panels.measured.setLayer(new SpotLayer(shown.spots, found, scaleColour(map, range), say));
  scaleLegend(legend, { map, range, unit: shown.spots.unit, title: `${shown.gene} measured in ${found.length} spots` });
}

function drawPredicted(found, strata, range) {
  const legend = find("predicted-legend");
  if (!found || !range) {
    panels.predicted.setLayer(null);
    noLegend(legend, shown.gene ? `${shown.gene} is not predicted here` : "nothing is predicted here");
    return;
  }
  const map = find("map").value;
  const widths = shown.layer.half_widths?.[shown.layer.column.get(shown.gene)];
  const say = (value, patch) => {
    if (Number.isNaN(value)) return "no prediction";
    const half = widths?.[strata ? strata[patch] : 0];
    return `${shown.gene} ${number(value)}${half === undefined ? "" : ` ± ${number(half)} (${shown.layer.interval})`}`;
  };
  panels.predicted.setLayer(new PatchLayer(shown.layer, found, scaleColour(map, range), say));
  const by = shown.layer.made_by?.preset ? ` by ${shown.layer.made_by.preset}` : "";
  scaleLegend(legend, { map, range, unit: shown.layer.unit, title: `${shown.gene} predicted${by}` });
}

function drawDomains(found) {
  const say = (label) => (label < 0 ? "in no domain" : `domain ${label}`);
  panels.predicted.setLayer(new PatchLayer(shown.layer, found, labelColour, say));
  domainLegend(find("predicted-legend"), shown.layer.domains);
}

function describeGene() {
  const { gene, layer } = shown;
  const i = layer?.column.get(gene);
  const words = [];
  const trust = i === undefined ? null : layer.trust?.[i];
  const widths = i === undefined ? null : layer.half_width_texts?.[i];
  if (widths != null) words.push(`${layer.interval} ${widths}${layer.strata ? ", by predicted library size" : ""}`);
  const scope = layer?.trust_scope ? ` (${layer.trust_scope})` : "";
  if (trust != null) words.push(`trust ${number(trust)}${scope}`);
  find("about-gene").textContent = gene && words.length ? `${gene}: ${words.join("; ")}` : "";
}

function fade() {
  const share = Number(find("opacity").value);
  find("opacity-value").textContent = `${share} %`;
  for (const panel of Object.values(panels)) panel.setOpacity(share / 100);
}

// ---------------------------------------------------------------- views

function leading() {
  return find("layout").value === "predicted" ? panels.predicted : panels.measured;
}

function arrange() {
  const layout = find("layout").value;
  find("measured-panel").hidden = layout === "predicted";
  find("predicted-panel").hidden = layout === "measured";
  // A view that was hidden has kept its old place, and takes a moment to know its size.
  leading().lead();
  setTimeout(() => leading().moved(), 150);
}

/** Read out what lies at a place, in both views, and outline it. */
function look(panel, place) {
  const readout = find("readout");
  readout.setAttribute("aria-live", panel.keyboard ? "polite" : "off");
  if (!place || !shown.slide) {
    Object.values(panels).forEach((each) => each.setSpotlight(null));
    return;
  }
  const said = [`x ${place.x.toFixed(0)} µm, y ${place.y.toFixed(0)} µm`];
  const spot = panels.measured.layer?.at(place.x, place.y);
  const patch = panels.predicted.layer?.at(place.x, place.y);
  if (spot) said.push(spot.words);
  if (patch) said.push(patch.words);
  readout.textContent = said.join(" · ");
  const mine = panel === panels.measured ? (spot ?? patch) : (patch ?? spot);
  const spotlight = { ...place, box: mine?.box };
  Object.values(panels).forEach((each) => each.setSpotlight(spotlight));
}

const notes = new Map();

/** Say something above the views, or take it back. */
function note(about, text) {
  if (text) notes.set(about, text);
  else notes.delete(about);
  find("notes").textContent = [...notes.values()].join(" ");
}

/** Keep what is shown in the address, so that it can be shared and reloaded. */
function remember() {
  const state = new URLSearchParams({ slide: shown.slide.id, gene: shown.gene ?? "", map: find("map").value });
  history.replaceState(null, "", `#${state}`);
}

/** Leave a time for whoever measures: of the moment when what was drawn is on the screen. */
function mark(name) {
  if (name === "gene-asked") performance.mark(name);
  else requestAnimationFrame(() => requestAnimationFrame(() => performance.mark(name)));
}

guarded(begin());
