// The address of what is seen: everything that was chosen, so that a link shows the same. What a link names and is not there
// is said, and the rest of it is shown.

import { NAMES } from "./colours.js";
import { find } from "./elements.js";
import { regionFromText, regionToText } from "./geometry.js";
import { note } from "./notes.js";

const CHOICES = ["show", "layout", "scale", "backdrop", "rim"]; // lists, by their names in the page
const NUMBERS = ["opacity", "spot-size", "least-tissue"];
const BOXES = ["outline", "lines", "everywhere", "spots-shown"];
const MAX_LETTERS = 6000; // what mail programs and chats keep of an address
const defaults = new Map();

/** Keep what the page shows at first: a link names only what differs. Call before anything is changed. */
export function rememberDefaults() {
  for (const id of [...CHOICES, ...NUMBERS]) defaults.set(id, find(id).value);
  for (const id of BOXES) defaults.set(id, find(id).checked);
}

/**
 * Write what is shown into the address.
 * @param shown see main.js
 * @param regions of the slide
 * @param compared which regions are compared, see Regions.compared
 * @param place what is in sight, in microns, or null for the whole slide
 */
export function writeLink(shown, regions, compared, place) {
  const state = new URLSearchParams({ slide: shown.slide.id, gene: shown.subject?.label ?? "", map: find("map").value });
  if (shown.subject?.isSet) state.set("set", shown.subject.genes.join(","));
  if (shown.second) state.set("second", shown.second.label);
  if (shown.layerNumber) state.set("grid", shown.layer.key);
  const limits = shown.limits.get(shown.subject?.label);
  if (limits) state.set("limits", limits.map((value) => Number(value.toPrecision(6))).join(","));
  for (const id of [...CHOICES, ...NUMBERS]) if (find(id).value !== defaults.get(id)) state.set(id, find(id).value);
  for (const id of BOXES) if (find(id).checked !== defaults.get(id)) state.set(id, find(id).checked ? "on" : "off");
  for (const show of ["domains", "clusters", "quality"]) {
    const hidden = [...shown.hiddenLabels(show)];
    if (hidden.length) state.set(`without-${show}`, hidden.join(","));
  }
  if (place) state.set("at", [place.x, place.y, place.width, place.height].map((um) => Math.round(10 * um) / 10).join(","));
  const known = state.toString();
  if (compared) state.set("compare", compared);
  for (const region of regions) state.append("region", regionToText(region));
  // Outlines that are too long are left out whole: half of a region would be another region.
  shown.isLinkShort = state.toString().length <= MAX_LETTERS;
  history.replaceState(null, "", `#${shown.isLinkShort ? state : known}`);
}

/** What the address names. */
export function readLink() {
  const found = new URLSearchParams(location.hash.slice(1));
  const numbers = (name, n) => {
    if (!found.has(name)) return null;
    const values = found.get(name).split(",").map(Number);
    if ((n && values.length !== n) || !values.every(Number.isFinite)) return missing(name, `${name}=${found.get(name)}`);
    return values;
  };
  const wanted = {
    slide: found.get("slide"),
    gene: found.get("gene"),
    second: found.get("second"),
    set: found.get("set")?.split(",").filter(Boolean) ?? null,
    grid: found.get("grid"),
    limits: numbers("limits", 2),
    at: numbers("at", 4),
    hidden: ["domains", "clusters", "quality"].map((show) => [show, numbers(`without-${show}`)]),
    regions: found.getAll("region").map(regionFromText),
    compare: found.get("compare"),
  };
  if (wanted.limits && !(wanted.limits[1] > wanted.limits[0])) wanted.limits = missing("limits", "limits without a range");
  if (wanted.at && !(wanted.at[2] > 0 && wanted.at[3] > 0)) wanted.at = missing("at", "a place without a size");
  if (wanted.regions.includes(null)) missing("regions", "a region that is no outline");
  wanted.regions = wanted.regions.filter(Boolean);
  choose("map", found, NAMES);
  for (const id of CHOICES) choose(id, found, [...find(id).options].filter((option) => !option.disabled).map((option) => option.value));
  for (const id of NUMBERS) takeNumber(id, found);
  for (const id of BOXES) {
    if (["on", "off"].includes(found.get(id))) find(id).checked = found.get(id) === "on";
    else if (found.has(id)) missing(id, `${id}=${found.get(id)}`);
  }
  wanted.show = found.get("show");
  wanted.layout = found.get("layout");
  return wanted;
}

function takeNumber(id, found) {
  if (!found.has(id)) return;
  const input = find(id);
  const value = found.get(id).trim() === "" ? NaN : Number(found.get(id));
  if (value >= Number(input.min) && value <= Number(input.max)) input.value = value;
  else missing(id, `${id}=${found.get(id)}`);
}

function choose(id, found, known) {
  if (!found.has(id)) return;
  if (known.includes(found.get(id))) find(id).value = found.get(id);
  else missing(id, `${id}=${found.get(id)}`);
}

/** Say what a link names and is not there. */
export function missing(about, what) {
  note(`link ${about}`, `The link names ${what}, which is not known here.`);
  return null;
}
