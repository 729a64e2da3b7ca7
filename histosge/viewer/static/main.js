// The page: what is chosen, what is read for it, and when the two views draw it.

import { NAMES } from "./colours.js";
import { plan, ranges, read, render, trustOf } from "./content.js";
import { Contrast } from "./contrast.js";
import { readDocument } from "./data.js";
import { counted, find, isNarrow } from "./elements.js";
import { bounds } from "./geometry.js";
import { noLegend, number } from "./legend.js";
import { missing, readLink, rememberDefaults, writeLink } from "./link.js";
import { clearNotes, note } from "./notes.js";
import { Panel, link } from "./panel.js";
import { Regions } from "./regions.js";
import { savePng, saveSvg } from "./save.js";
import { GeneSearch } from "./search.js";
import { GeneSets } from "./sets.js";
import { Subject } from "./subject.js";
import { followTheme } from "./theme.js";

const POLL_MS = 1500;
const PAUSE_MS = 300; // after the last movement, before it is written into the address
const shown = {
  slides: [],
  slide: null,
  layer: null,
  layerNumber: 0,
  spots: null,
  subject: null,
  second: null,
  names: [],
  limits: new Map(), // name of a gene or set -> [low, high] that was set for it
  hidden: new Map(),
  isLive: false,
  requests: 0,
  opened: 0,
  redraw: () => guarded(draw()),
  /** Labels of domains, clusters or flags that are not drawn. */
  hiddenLabels(show) {
    if (!shown.hidden.has(show)) shown.hidden.set(show, new Set());
    return shown.hidden.get(show);
  },
};
const panels = {};
let search, secondSearch, contrast, regions, sets;

async function begin() {
  panels.measured = new Panel(find("measured"), "Slide in the first view", look);
  panels.predicted = new Panel(find("predicted"), "Slide in the second view", look);
  link(panels.measured, panels.predicted);
  search = new GeneSearch(find("gene"), find("genes"), pick);
  secondSearch = new GeneSearch(find("second"), find("second-genes"), pickSecond);
  contrast = new Contrast(setLimits);
  regions = new Regions(Object.values(panels), shown, remember, pick);
  sets = new GeneSets((subject) => chooseSubject(subject, true));
  find("map").replaceChildren(...NAMES.map((name) => new Option(name)));
  rememberDefaults();
  const wanted = readLink();
  listen();
  const index = await readDocument("data/index.json");
  document.title = `${index.title} · histosge`;
  shown.isLive = index.live === true;
  shown.slides = index.slides;
  find("slide").replaceChildren(...index.slides.map((id, i) => new Option(id, i)));
  if (index.gene_sets) guarded(sets.read());
  const first = Math.max(0, index.slides.indexOf(wanted.slide));
  find("slide").value = first;
  if (wanted.slide !== null && !index.slides.includes(wanted.slide)) {
    note("link slide", `The link names slide ${wanted.slide}, which is not in this store; ${index.slides[first]} is shown.`);
    Object.assign(wanted, { at: null, regions: [] }); // they belong to the other slide
  }
  await openSlide(first, wanted);
}

function listen() {
  find("controls").addEventListener("submit", (event) => event.preventDefault());
  find("slide").addEventListener("change", (event) => changeSlide(Number(event.target.value)));
  find("layer").addEventListener("change", (event) => guarded(openLayer(Number(event.target.value)).then(draw)));
  for (const id of ["map", "show", "outline", "lines", "spots-shown", "spot-size", "rim", "least-tissue"]) {
    find(id).addEventListener("change", shown.redraw);
  }
  find("scale").addEventListener("change", () => setLimits(null));
  find("everywhere").addEventListener("change", shown.redraw);
  find("layout").addEventListener("change", () => {
    arrange();
    shown.redraw();
  });
  for (const id of ["opacity", "spot-size", "least-tissue"]) find(id).addEventListener("input", tellSliders);
  find("opacity").addEventListener("input", fade);
  find("opacity").addEventListener("change", remember);
  find("backdrop").addEventListener("change", () => {
    fade();
    remember();
  });
  find("previous").addEventListener("click", () => step(-1));
  find("next").addEventListener("click", () => step(1));
  find("zoom-in").addEventListener("click", () => leading().zoom(1.5));
  find("zoom-out").addEventListener("click", () => leading().zoom(1 / 1.5));
  find("home").addEventListener("click", () => leading().home());
  find("toggle-tools").addEventListener("click", () => showTools(find("tools").hidden));
  find("save-png").addEventListener("click", () => guarded(savePng(shown, panels, seenNames())));
  find("save-svg").addEventListener("click", () => guarded(saveSvg(shown, panels, seenNames())));
  find("copy-link").addEventListener("click", () => guarded(copyLink()));
  for (const panel of Object.values(panels)) panel.viewer.addHandler("animation-finish", remember);
  // Another link in the same tab changes the address alone; what the page writes itself is no such change.
  window.addEventListener("hashchange", () => location.reload());
  followTheme(() => contrast.paint());
  tellSliders();
  fade();
}

function guarded(work) {
  return work.catch((error) => {
    document.body.dataset.state = "failed";
    note("error", error.message);
  });
}

// ---------------------------------------------------------------- a slide

function changeSlide(n) {
  // What was set for one slide holds for the next only where that was chosen.
  if (!find("everywhere").checked) shown.limits.clear();
  shown.hidden.clear();
  const { subject } = shown;
  return guarded(openSlide(n, { gene: subject?.label, set: subject?.genes }));
}

/** @param wanted what a link or the slide before names, see readLink */
async function openSlide(n, wanted) {
  const opened = ++shown.opened;
  const base = `data/${n}`;
  document.body.dataset.state = "loading";
  clearNotes();
  const slide = await readDocument(`${base}/slide.json`);
  if (opened !== shown.opened) return;
  Object.assign(shown, { slide, base, layer: null, layerNumber: 0, spots: null, subject: null, wanted, chosen: false });
  slide.notes.forEach((text, i) => note(`slide ${i}`, text));
  for (const panel of Object.values(panels)) panel.setLayer(null);
  const thumbnails = Promise.all(Object.values(panels).map((panel) => panel.open(slide, base)));
  thumbnails.then(() => mark("thumbnail"));
  guarded(openPicture(opened, base));
  if (slide.spots) guarded(openSpots(opened, base));
  find("layer").replaceChildren(...slide.layers.map((key, i) => new Option(key, i)));
  find("layer-field").hidden = slide.layers.length < 2;
  chooseLayout(wanted);
  find("predicted-title").textContent = "Slide";
  const layer = Math.max(0, slide.layers.indexOf(wanted.grid));
  if (wanted.grid && !slide.layers.includes(wanted.grid)) missing("grid", `grid ${wanted.grid}`);
  find("layer").value = layer;
  if (slide.layers.length) await openLayer(layer);
  if (opened !== shown.opened) return;
  listGenes();
  await thumbnails;
  if (opened !== shown.opened) return;
  takeLink(wanted);
  const start = wanted.set ? new Subject(wanted.gene || "my set", wanted.set) : new Subject(shown.names.includes(wanted.gene) ? wanted.gene : shown.names[0]);
  // While spots are still read, they may have it.
  if (wanted.gene && !wanted.set && !shown.names.includes(wanted.gene) && !(slide.spots && !shown.spots)) noteGene(wanted.gene);
  if (start.label !== undefined) await chooseSubject(start);
  else await draw();
}

/** What a slide has decides which views there are; a link may choose among them. */
function chooseLayout(wanted) {
  const { slide } = shown;
  const layout = find("layout");
  const can = {
    both: slide.spots && slide.layers.length,
    measured: slide.spots,
    predicted: slide.layers.length || !slide.spots,
    "pair-predicted": slide.layers.length,
    "pair-measured": slide.spots,
  };
  for (const option of layout.options) option.disabled = !can[option.value];
  if (wanted.layout && can[wanted.layout]) layout.value = wanted.layout;
  else layout.value = can.both ? "both" : can.measured ? "measured" : "predicted";
  if (wanted.layout && !can[wanted.layout]) missing("layout", `the views “${wanted.layout}”`);
  arrange();
}

/** Take from a link what only an opened slide has. */
function takeLink(wanted) {
  for (const [show, hidden] of wanted.hidden ?? []) hideLabels(show, hidden ?? []);
  if (wanted.limits && wanted.gene) shown.limits.set(wanted.gene, wanted.limits);
  if (wanted.second) {
    if (shown.names.includes(wanted.second)) shown.second = new Subject(wanted.second);
    else if (!shown.slide.spots || shown.spots) missing("second", `second gene ${wanted.second}`);
  }
  const [x, y, width, height] = wanted.at ?? [];
  if (wanted.at && !isOnSlide([x, y, x + width, y + height])) missing("at", "a place beside the slide");
  else if (wanted.at) leading().goTo({ x, y, width, height });
  const here = (wanted.regions ?? []).filter(({ polygons }) => isOnSlide(bounds(polygons)));
  const beside = (wanted.regions ?? []).length - here.length;
  if (beside) missing("regions beside", `${counted(beside, "region")} beside the slide`);
  regions.set(here.length ? here : regions.list);
  if (here.length && wanted.compare !== null && !regions.compareAs(wanted.compare)) missing("compare", `compare=${wanted.compare}`);
  if (here.length) find("region-tools").open = true;
}

/** Whether a box of left, top, right and bottom touches the slide. */
function isOnSlide([left, top, right, bottom]) {
  const [width, height] = shown.slide.size_um;
  return right > 0 && bottom > 0 && left < width && top < height;
}

/** Hide domains, clusters or flags that a link names. */
function hideLabels(show, wanted) {
  const known = show === "quality" ? (shown.layer?.quality.length ?? 0) : (shown.layer?.[show] ?? 0);
  const isKnown = (label) => Number.isInteger(label) && label >= 0 && label < known;
  for (const label of wanted.filter(isKnown)) shown.hiddenLabels(show).add(label);
  const unknown = wanted.filter((label) => !isKnown(label));
  if (unknown.length) missing(`without ${show}`, `${show} ${unknown.join(", ")}`);
}

function noteGene(gene) {
  note("gene", `${gene} is neither predicted nor measured on this slide.`);
}

/** Lay the H&E's tiles over the thumbnail as soon as the slide is open; say so where it cannot be. */
async function openPicture(opened, base) {
  note("picture", "");
  for (;;) {
    const picture = await readDocument(`${base}/picture.json`);
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
  const spots = await readDocument(`${base}/spots.json`);
  if (opened !== shown.opened) return;
  if (spots.error) {
    note("spots", `Measured spots: ${spots.error}.`);
    noLegend(find("measured-legend"), "no measured spots");
    return;
  }
  spots.column = new Map(spots.genes.map((name, i) => [name, i]));
  shown.spots = spots;
  listGenes();
  const { wanted } = shown;
  if (wanted.second && !shown.second) {
    if (shown.names.includes(wanted.second)) shown.second = new Subject(wanted.second);
    else missing("second", `second gene ${wanted.second}`);
  }
  // A gene that was wanted before it was known: only the spots have it.
  const late = !shown.chosen && !wanted.set && wanted.gene !== shown.subject?.label && spots.column.has(wanted.gene);
  if (wanted.gene && !wanted.set && !shown.names.includes(wanted.gene)) noteGene(wanted.gene);
  if (late) await chooseSubject(new Subject(wanted.gene));
  else if (shown.subject) await draw();
  else if (shown.names.length && !shown.slide.layers.length) await chooseSubject(new Subject(shown.names[0]));
  if (regions.list.length) regions.compare();
}

async function openLayer(n) {
  const base = `${shown.base}/layers/${n}`;
  const opened = shown.opened;
  const layer = await readDocument(`${base}/layer.json`);
  if (opened !== shown.opened) return;
  layer.base = base;
  layer.column = new Map(layer.genes.map((name, i) => [name, i]));
  shown.layer = layer;
  shown.layerNumber = n;
  note("layer", layer.note ?? "");
  note("training", layer.caveat ?? "", layer.training === "held out");
  const badge = find("training");
  badge.hidden = !layer.training;
  badge.textContent = layer.training ?? "";
  badge.className = `badge ${(layer.training ?? "").replaceAll(" ", "-")}`;
  badge.title = layer.caveat ?? "";
  offerPictures(layer);
  listGenes();
}

/** Offer what this grid has; a link or the last slide may have chosen what it does not have. */
function offerPictures(layer) {
  const select = find("show");
  const can = {
    gene: layer.genes.length,
    blend: layer.genes.length || shown.slide.spots,
    domains: layer.domains,
    components: layer.components,
    clusters: layer.clusters,
    quality: layer.quality.length,
    tissue: layer.tissue,
  };
  for (const option of select.options) option.hidden = option.disabled = !can[option.value];
  if (can[select.value]) return;
  if (shown.wanted.show === select.value) missing("show", `“${select.selectedOptions[0].textContent}”`);
  select.value = ["gene", "domains", "components", "tissue"].find((value) => can[value]) ?? "gene";
}

/** How well a gene agrees with the slide's own spots; it takes a moment, and nothing waits for it. */
async function readAgreement(subject) {
  const { layer, spots } = shown;
  const gene = subject.isSet ? undefined : layer?.column.get(subject.label);
  if (!layer?.agreement || gene === undefined || !spots?.column.has(subject.label)) return;
  layer.r ??= new Map();
  if (layer.r.has(gene)) return;
  layer.r.set(gene, await readDocument(`${layer.base}/agreement/${gene}.json`));
  describeSubjects();
}

function listGenes() {
  const predicted = shown.layer?.column ?? new Map();
  const measured = shown.spots?.column ?? new Map();
  shown.names = [...predicted.keys(), ...[...measured.keys()].filter((name) => !predicted.has(name))];
  const genes = shown.names.map((name) => {
    const kinds = [measured.has(name) && "measured", predicted.has(name) && "predicted"].filter(Boolean);
    const trust = shown.layer?.trust?.[predicted.get(name)];
    const abstained = shown.layer?.abstained?.[predicted.get(name)] === true;
    const words = kinds.join(", ") + (trust == null ? "" : `, trust ${number(trust)}`) + (abstained ? ", the model abstains" : "");
    return { name, note: words, abstained };
  });
  search.setGenes(genes);
  secondSearch.setGenes(genes);
  find("gene").disabled = find("second").disabled = !shown.names.length;
  find("previous").disabled = find("next").disabled = shown.names.length < 2;
  // Of a store without a map: what belongs to genes is not there, see viewer.css.
  document.body.dataset.genes = shown.names.length ? "some" : "none";
  find("layout").querySelector("[value=predicted]").text = shown.slide.layers.length && !shown.names.length ? "patches only" : "predicted only";
}

// ---------------------------------------------------------------- a gene

function step(by) {
  const at = shown.names.indexOf(shown.subject?.label);
  pick(shown.names[(at + by + shown.names.length) % shown.names.length]);
}

/** Take a gene that a person chose. */
function pick(name) {
  return chooseSubject(new Subject(name), true);
}

function pickSecond(name) {
  shown.second = new Subject(name);
  const isSeen = find("show").value === "blend" || find("layout").value.startsWith("pair");
  if (!isSeen) find("layout").value = shown.layer?.genes.length ? "pair-predicted" : "pair-measured";
  arrange();
  return shown.redraw();
}

function chooseSubject(subject, byPerson = false) {
  mark("gene-asked");
  if (byPerson) shown.chosen = true;
  if (byPerson || subject.label === shown.wanted.gene) note("gene", "");
  if (byPerson && shown.layer?.genes.length && !["gene", "blend"].includes(find("show").value)) find("show").value = "gene";
  shown.subject = subject;
  search.show(subject.isSet ? "" : subject.label);
  return guarded(draw());
}

/** Read what is chosen and draw it; of several calls only the last one draws. */
async function draw() {
  const request = ++shown.requests;
  document.body.dataset.state = "loading";
  const plans = plan(shown);
  const found = await Promise.all(plans.map((each) => read(shown, each)));
  if (request !== shown.requests) return;
  const spans = ranges(shown, plans, found);
  plans.forEach((each, i) => render(shown, panels[each.view], each, found[i], spans[i]));
  const first = spans[0] ?? spans[1];
  // The scale that is seen now is the one to be kept.
  if (find("everywhere").checked && shown.subject && first) shown.limits.set(shown.subject.label, first);
  const seen = plans.map((each, i) => each.subject === shown.subject && found[i].values).filter(Boolean);
  contrast.show(seen, seen.length ? first : null, find("map").value);
  describeSubjects();
  sets.describe(shown.subject, shown.layer, shown.spots);
  secondSearch.show(shown.second?.label ?? "");
  writeNow();
  document.body.dataset.gene = shown.subject?.label ?? "";
  document.body.dataset.state = "ready";
  mark("gene-drawn");
  for (const subject of seenSubjects()) guarded(readAgreement(subject));
}

function setLimits(range) {
  if (!shown.subject) return;
  if (range) shown.limits.set(shown.subject.label, range);
  else shown.limits.delete(shown.subject.label);
  if (!range) find("everywhere").checked = false;
  shown.redraw();
}

/** The gene, and the second one where it is seen, too. */
function seenSubjects() {
  const isPaired = find("layout").value.startsWith("pair") || find("show").value === "blend";
  return [shown.subject, isPaired ? shown.second : null].filter(Boolean);
}

/** Names of what is coloured; none where domains or clusters alone are seen. */
function seenNames() {
  const { show, layout } = { show: find("show").value, layout: find("layout").value };
  const hasGene = layout !== "predicted" || ["gene", "blend"].includes(show);
  return hasGene ? seenSubjects().map((subject) => subject.label) : [];
}

function describeSubjects() {
  find("about-gene").textContent = seenSubjects().map(describe).filter(Boolean).join("\n");
}

function describe(subject) {
  const { layer } = shown;
  const own = (list) => (subject.isSet ? null : list?.[layer.column.get(subject.label)]);
  const words = [];
  if (subject.isSet) words.push(`mean z-score of ${counted(subject.genes.length, "gene")}`);
  const [trust, widths, r] = [own(layer?.trust), own(layer?.half_width_texts), agreement(subject)];
  if (widths != null) words.push(`${layer.interval} ${widths}${layer.strata ? ", by predicted library size" : ""}`);
  const scope = layer?.trust_scope ? ` (${layer.trust_scope})` : "";
  if (trust != null) words.push(`trust ${number(trust)}${scope}`);
  const known = layer ? trustOf(layer, subject) : { abstained: 0 };
  if (known.abstained && known.abstained === known.predicted) words.push("the model abstains: do not interpret it");
  else if (known.abstained) words.push(`the model abstains from ${known.abstained} of its ${known.predicted} predicted genes`);
  if (r?.r != null) words.push(`r ${number(r.r)} on this slide's own ${counted(r.n, "spot")} (${layer.training})`);
  return words.length ? `${subject.label}: ${words.join("; ")}` : "";
}

function agreement(subject) {
  const { layer } = shown;
  return subject.isSet ? null : layer?.r?.get(layer.column.get(subject.label));
}

function fade() {
  for (const panel of Object.values(panels)) {
    panel.setOpacity(Number(find("opacity").value) / 100);
    panel.setBackdrop(find("backdrop").value);
  }
}

function tellSliders() {
  for (const [id, unit] of [["opacity", " %"], ["spot-size", " %"], ["least-tissue", " %"]]) {
    find(`${id}-value`).textContent = `${find(id).value}${unit}`;
  }
}

// ---------------------------------------------------------------- views

/** The view that the buttons move: the one that was touched last, of those that are seen. */
function leading() {
  const seen = Object.values(panels).filter((panel) => !panel.host.closest("section").hidden);
  return seen.find((panel) => !panel.following) ?? seen[0];
}

function arrange() {
  const layout = find("layout").value;
  const before = leading();
  find("measured-panel").hidden = layout === "predicted";
  find("predicted-panel").hidden = layout === "measured";
  // A view that was hidden has kept its old place: it takes that of the one that was seen, once it knows its size.
  const after = before.host.closest("section").hidden ? leading() : before;
  if (after !== before) after.take(before);
  after.lead();
  setTimeout(() => after.moved(), 150);
}

function showTools(isShown) {
  find("tools").hidden = !isShown;
  find("toggle-tools").setAttribute("aria-expanded", String(isShown));
  if (isShown && isNarrow()) find("tools").scrollIntoView();
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
  const first = panels.measured.layer?.at(place.x, place.y);
  const second = panels.predicted.layer?.at(place.x, place.y);
  if (first) said.push(first.words);
  if (second) said.push(second.words);
  readout.textContent = said.join(" · ");
  const mine = panel === panels.measured ? (first ?? second) : (second ?? first);
  const spotlight = { ...place, box: mine?.box };
  Object.values(panels).forEach((each) => each.setSpotlight(spotlight));
}

let pause;

/** Keep what is shown in the address, so that it can be shared and reloaded. */
function remember() {
  clearTimeout(pause);
  pause = setTimeout(() => shown.slide && writeNow(), PAUSE_MS);
}

function writeNow() {
  clearTimeout(pause);
  const panel = leading();
  writeLink(shown, regions.list, regions.compared, panel.isHome || !panel.host.clientWidth ? null : (panel.target ?? panel.inSight()));
}

async function copyLink() {
  writeNow();
  const said = find("share-help");
  const rest = shown.isLinkShort ? "" : " Its regions are too long for a link: save them as GeoJSON.";
  try {
    await navigator.clipboard.writeText(location.href);
    said.textContent = `The link is copied.${rest}`;
  } catch {
    said.textContent = `The browser keeps the clipboard: copy the page's address instead.${rest}`;
  }
  if (shown.isLive) said.textContent += " It opens while this server runs on this machine.";
}

/** Leave a time for whoever measures: of the moment when what was drawn is on the screen. */
function mark(name) {
  if (name === "gene-asked") performance.mark(name);
  else requestAnimationFrame(() => requestAnimationFrame(() => performance.mark(name)));
}

guarded(begin());
