// Regions of a slide: the list, drawing them, files, and the genes that differ in them.

import { regionColour } from "./colours.js";
import { post } from "./data.js";
import { Drawing } from "./drawing.js";
import { button, counted, element, fileName, find, isNarrow, saveFile } from "./elements.js";
import { bounds, regionsFromGeoJson, regionsToGeoJson } from "./geometry.js";
import { note } from "./notes.js";
import { compareHere } from "./statistics.js";
import { GeneTable, tableAsCsv } from "./gene_table.js";

export class Regions {
  /**
   * @param panels the views
   * @param shown what the page shows: { slide, base, layer, spots, isLive }
   * @param onChange called after regions have changed
   * @param onGene called with the name of a gene that was chosen in the table
   */
  constructor(panels, shown, onChange, onGene) {
    this.panels = panels;
    this.shown = shown;
    this.onChange = onChange;
    this.bySlide = new Map();
    this.requests = 0;
    this.table = new GeneTable(find("region-genes"), onGene);
    this.drawing = new Drawing(panels, (corners) => this.drawn(corners));
    for (const kind of ["lasso", "rectangle"]) find(kind).addEventListener("click", () => this.draw(kind));
    find("in-sight").addEventListener("click", () => this.addInSight());
    find("region-file").addEventListener("change", (event) => this.open(event.target));
    find("save-regions").addEventListener("click", () => this.save());
    find("save-genes").addEventListener("click", () => this.saveTable());
    for (const id of ["region-one", "region-other"]) {
      find(id).addEventListener("change", () => {
        this.compare();
        this.onChange();
      });
    }
    find("region-values").addEventListener("change", () => {
      this.table.show(find("region-values").value);
      this.onChange();
    });
  }

  /** The regions of the slide that is shown. */
  get list() {
    return this.bySlide.get(this.shown.slide?.id) ?? [];
  }

  /** Take regions, such as those of a link, for the slide that is shown. */
  set(regions) {
    this.bySlide.set(this.shown.slide.id, []);
    for (const region of regions) this.keep(region);
    this.changed();
  }

  keep(region) {
    const taken = new Set(this.list.map((each) => each.colour));
    const free = [0, 1, 2, 3, 4, 5, 6].map(regionColour).find((colour) => !taken.has(colour));
    const colour = free ?? regionColour(this.list.length);
    this.bySlide.set(this.shown.slide.id, [...this.list, { ...region, colour }]);
  }

  add(region) {
    this.keep(region);
    find("region-one").value = "";
    return this.changed(this.list.length - 1);
  }

  draw(kind) {
    const again = this.drawing.kind === kind;
    if (this.drawing.kind) this.drawing.stop(null);
    if (again) return;
    this.drawing.start(kind);
    find(kind).setAttribute("aria-pressed", "true");
    find("region-help").textContent = `Draw a ${kind} on either view; Escape gives it up.`;
    if (isNarrow()) this.panels.find((each) => each.host.clientWidth).host.scrollIntoView({ block: "center" });
  }

  drawn(corners) {
    for (const kind of ["lasso", "rectangle"]) find(kind).setAttribute("aria-pressed", "false");
    find("region-help").textContent = "";
    if (!corners) return;
    const compared = this.add({ name: this.freeName(), polygons: [[corners]] });
    if (isNarrow()) compared.then(() => find("region-tools").scrollIntoView());
  }

  freeName() {
    const taken = new Set(this.list.map((region) => region.name));
    let n = 1;
    while (taken.has(`region ${n}`)) n++;
    return `region ${n}`;
  }

  /** What is in sight as a region: the way without a pointer. */
  addInSight() {
    const panel = this.panels.find((each) => each.host.clientWidth);
    const { x, y, width, height } = panel.inSight();
    const ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height]];
    this.add({ name: this.freeName(), polygons: [[ring]] });
  }

  async open(input) {
    const [file] = input.files;
    input.value = ""; // the same file may be opened again
    if (!file) return;
    try {
      const { slide } = this.shown;
      const { regions, skipped } = regionsFromGeoJson(await file.text(), slide.mpp);
      const [width, height] = slide.size_um;
      const outside = regions.filter(({ polygons }) => {
        const [left, top, right, bottom] = bounds(polygons);
        return right < 0 || bottom < 0 || left > width || top > height;
      });
      if (outside.length === regions.length) {
        throw new Error("its outlines lie beside this slide; coordinates are pixels of level 0, as QuPath writes them");
      }
      for (const region of regions) this.keep(region);
      const said = [];
      if (skipped) said.push(`${skipped} of its features are no polygons and are left out.`);
      if (outside.length) said.push(`${outside.length} of its regions lie beside this slide.`);
      note("regions", said.length ? `${file.name}: ${said.join(" ")}` : "");
      this.changed(this.list.length - regions.length);
    } catch (error) {
      note("regions", `${file.name}: ${error.message}.`);
    }
  }

  save() {
    const { slide } = this.shown;
    saveFile(fileName(slide.id, "regions.geojson"), regionsToGeoJson(this.list, slide.mpp), "application/geo+json");
  }

  saveTable() {
    const [one, other] = this.chosen();
    const text = tableAsCsv(this.table, this.shown.slide.id, one.name, other?.name ?? "rest of the tissue");
    saveFile(fileName(this.shown.slide.id, one.name, "genes.csv"), text, "text/csv");
  }

  rename(i, name) {
    this.list[i].name = name.replaceAll("|", " ").trim().slice(0, 80) || this.freeName();
    this.changed();
  }

  remove(i) {
    this.bySlide.set(this.shown.slide.id, this.list.filter((_, other) => other !== i));
    this.changed();
  }

  /** Redraw the list and the views, and compare again. @param one number of the region to compare, if it is to change */
  changed(one = null) {
    const { list } = this;
    for (const panel of this.panels) panel.setRegions(list);
    find("region-list").replaceChildren(...list.map((region, i) => this.row(region, i)));
    fillChoice(find("region-one"), list, [], one);
    fillChoice(find("region-other"), list, ["the rest"], null);
    find("region-result").hidden = find("save-regions").disabled = !list.length;
    this.onChange();
    return this.compare();
  }

  row(region, i) {
    const swatch = element("span", "swatch");
    swatch.style.background = region.colour;
    const name = element("input");
    name.value = region.name;
    name.setAttribute("aria-label", `Name of region ${i + 1}`);
    name.addEventListener("change", () => this.rename(i, name.value));
    return element("li", "", swatch, name, button("Remove", () => this.remove(i), `Remove ${region.name}`));
  }

  chosen() {
    const other = find("region-other").value;
    return [this.list[Number(find("region-one").value)], other === "" ? null : this.list[Number(other)]];
  }

  /** Which regions are compared, and by which values, as a link has it; empty where it is what the page shows anyway. */
  get compared() {
    if (!this.list.length) return "";
    const chosen = [find("region-one").value, find("region-other").value || "rest", find("region-values").value];
    return chosen.join() === "0,rest,predicted" ? "" : chosen.join();
  }

  /** Compare what a link names; tell whether it is there. */
  compareAs(text) {
    const [one, other, values, ...more] = text.split(",");
    const named = [["region-one", one], ["region-other", other === "rest" ? "" : other], ["region-values", values]];
    const isThere = ([id, value]) => [...find(id).options].some((option) => option.value === value);
    if (more.length || !named.every(isThere)) return false;
    for (const [id, value] of named) find(id).value = value;
    this.compare();
    return true;
  }

  /** Compare the chosen regions; of several calls only the last one shows its result. */
  async compare() {
    const request = ++this.requests;
    const [one, other] = this.chosen();
    if (!one) return this.table.clear();
    const { shown } = this;
    find("region-counts").textContent = "computing …";
    delete document.body.dataset.regions;
    try {
      const found = shown.isLive
        ? await post(`${shown.base}/regions`, { layer: shown.layerNumber, region: one.polygons, other: other?.polygons ?? null })
        : await compareHere(shown, one, other);
      if (request !== this.requests) return;
      this.table.take(found, shown, one.name, other?.name ?? null);
      find("region-counts").textContent = counts(found, one.name, other?.name ?? "the rest");
      const values = find("region-values");
      for (const option of values.options) option.disabled = !found[option.value];
      if (values.selectedOptions[0].disabled) values.value = found.predicted ? "predicted" : "measured";
      this.table.show(values.value);
      document.body.dataset.regions = String(request);
    } catch (error) {
      if (request === this.requests) find("region-counts").textContent = error.message;
    }
  }
}

function counts({ predicted, measured }, one, other) {
  const said = [];
  if (measured) said.push(`${counted(measured.n, "measured spot")} in ${one}, ${measured.n_rest} in ${other}`);
  if (predicted) said.push(`${counted(predicted.n, "predicted patch")} in ${one}, ${predicted.n_rest} in ${other}`);
  return said.length ? `${said.join("; ")}.` : "Nothing is measured or predicted here.";
}

function fillChoice(select, list, first, chosen) {
  const before = select.value;
  const options = [...first.map((text) => new Option(text, "")), ...list.map((region, i) => new Option(region.name, i))];
  select.replaceChildren(...options);
  const wanted = chosen === null ? before : String(chosen);
  select.value = options.some((option) => option.value === wanted) ? wanted : options[0]?.value;
}
