// What the two views draw: which values are read for them, on which scale, and in which words they are explained.

import { GREY, blendColour, domainColour, robustRange } from "./colours.js";
import { bytes, labels } from "./data.js";
import { counted, element, find } from "./elements.js";
import { PatchLayer, SpotLayer, lowFirst, scaleColour } from "./layers.js";
import { blendLegend, labelLegend, noLegend, number, scaleLegend } from "./legend.js";

const MIXABLE = new Set(["gene", "blend"]);
const TITLES = {
  domains: "Spatial domains",
  components: "Components of the embeddings",
  clusters: "Clusters of the embeddings",
  quality: "Quality flags",
  tissue: "Tissue share",
};

/** What each view is to show: {name of the view, what: "spots" or "patches", show, subject, other}. */
export function plan(shown) {
  const layout = find("layout").value;
  const { subject, second } = shown;
  if (layout === "pair-predicted" || layout === "pair-measured") {
    const what = layout === "pair-measured" ? "spots" : "patches";
    return [
      { view: "measured", what, show: "gene", subject },
      { view: "predicted", what, show: "gene", subject: second },
    ];
  }
  const show = find("show").value;
  return [
    { view: "measured", what: "spots", show: show === "blend" ? "blend" : "gene", subject, other: second },
    { view: "predicted", what: "patches", show, subject, other: second },
  ];
}

/** Read the values of one view. */
export async function read(shown, { what, show, subject, other }) {
  const { layer, spots, base } = shown;
  if (what === "spots") {
    if (!spots || !find("spots-shown").checked) return {};
    const of = (each) => each?.read(`${base}/spots`, spots.column) ?? null;
    const [values, others] = await Promise.all([of(subject), show === "blend" ? of(other) : null]);
    return { values, others };
  }
  if (!layer) return {};
  const wantsRim = find("rim").value !== "shown" && layer.tissue;
  const of = (each) => each?.read(`${layer.base}/genes`, layer.column) ?? null;
  const [values, others, strata, tissue, picture] = await Promise.all([
    MIXABLE.has(show) ? of(subject) : null,
    show === "blend" ? of(other) : null,
    layer.strata && show === "gene" ? labels(`${layer.base}/strata.i16`) : null,
    wantsRim || show === "tissue" ? bytes(`${layer.base}/tissue.u8`) : null,
    readPicture(layer, show),
  ]);
  return { values, others, strata, tissue, picture };
}

function readPicture(layer, show) {
  if (show === "domains") return layer.domains ? labels(`${layer.base}/domains.i16`) : null;
  if (show === "clusters") return layer.clusters ? labels(`${layer.base}/clusters.i16`) : null;
  if (show === "components") return layer.components ? bytes(`${layer.base}/components.u8`) : null;
  if (show === "quality") return layer.quality ? bytes(`${layer.base}/quality.u8`) : null;
  return null;
}

/** The scale of each view: what was set by hand, one for both, or each its own. */
export function ranges(shown, plans, found) {
  const own = found.map(({ values }) => values && robustRange(values));
  const [one, two] = own;
  let shared = one ?? two;
  // Two genes on one scale: from the lesser to the greater.
  if (plans[1].subject !== plans[0].subject && one && two) shared = [Math.min(one[0], two[0]), Math.max(one[1], two[1])];
  const setFor = (each) => shown.limits.get(each.subject?.label);
  const others = found.map((each) => each.others && robustRange(each.others));
  found.forEach((each, i) => {
    const wanted = find("scale").value === "shared" ? (others[0] ?? others[1]) : others[i];
    each.otherRange = shown.limits.get(plans[i].other?.label) ?? wanted;
  });
  // One scale is one scale: what was set by hand for the first view holds for the second.
  if (find("scale").value === "shared") return plans.map((_, i) => setFor(plans[0]) ?? shared ?? own[i]);
  return plans.map((each, i) => setFor(each) ?? own[i]);
}

/** Draw one view, with its title and legend. */
export function render(shown, panel, each, found, range) {
  const title = find(`${each.view}-title`);
  const figure = find(`${each.view}-legend`);
  title.textContent = titleOf(shown, each);
  if (!figure.querySelector("input[type=checkbox]") || !["domains", "clusters", "quality"].includes(each.show)) delete figure.dataset.items;
  const made = each.what === "spots" ? renderSpots(shown, each, found, range, figure) : renderPatches(shown, each, found, range, figure);
  if (each.what === "patches" && made) sayRim(figure);
  panel.setLayer(made);
}

/** Say in the legend what happens to patches with little tissue. */
function sayRim(figure) {
  const rim = find("rim").value;
  const caption = figure.querySelector("figcaption");
  caption.querySelector(".rim-words")?.remove();
  if (rim !== "shown") caption.append(element("span", "rim-words", ` Patches with less than ${find("least-tissue").value} % tissue are ${rim}.`));
}

function titleOf({ layer }, { what, show, subject }) {
  const paired = find("layout").value.startsWith("pair");
  if (what === "spots") return paired ? `Measured: ${subject?.label ?? "no gene"}` : "Measured spots";
  if (paired) return `Predicted: ${subject?.label ?? "no gene"}`;
  if (MIXABLE.has(show)) return layer?.genes.length ? "Predicted, every patch" : "Slide";
  return TITLES[show] ?? "Slide";
}

function renderSpots(shown, each, { values, others, otherRange }, range, figure) {
  const { spots } = shown;
  const { subject, other } = each;
  if (!spots) return null; // the legend says why, or that they are being read
  if (!find("spots-shown").checked) {
    noLegend(figure, "measured spots are hidden");
    return null;
  }
  if (!values || !range) {
    noLegend(figure, subject ? `${subject.label} was not measured` : "no gene is chosen");
    return null;
  }
  const options = { size: Number(find("spot-size").value) / 100, outline: find("outline").checked };
  const order = lowFirst(values);
  if (others) {
    const mixed = mixture([subject, other], [values, others], [range, otherRange]);
    blendLegend(figure, mixed.legend, `Measured in ${counted(values.length, "spot")}.`);
    return new SpotLayer(spots, order, mixed.colour, mixed.say, options);
  }
  const map = find("map").value;
  const colour = scaleColour(map, range);
  scaleLegend(figure, { map, range, unit: subject.unit(spots.unit), title: `${subject.label} measured in ${counted(values.length, "spot")}` });
  return new SpotLayer(spots, order, (i) => colour(values[i]), (i) => `${subject.label} ${number(values[i])}`, options);
}

function mixture(subjects, both, ranges) {
  const legend = subjects.map(({ label }, i) => ({ label, range: ranges[i] ?? [0, 1] }));
  const share = (which, i) => (both[which][i] - legend[which].range[0]) / (legend[which].range[1] - legend[which].range[0]);
  const colour = (i) => (Number.isNaN(both[0][i]) || Number.isNaN(both[1][i]) ? null : blendColour(share(0, i), share(1, i)));
  const say = (i) => subjects.map(({ label }, which) => `${label} ${number(both[which][i])}`).join(", ");
  return { legend, colour, say };
}

function renderPatches(shown, each, found, range, figure) {
  const { layer } = shown;
  const { subject, other, show } = each;
  if (!layer) return null;
  const rim = find("rim").value;
  const least = (Number(find("least-tissue").value) / 100) * 255;
  const isLow = found.tissue ? (i) => found.tissue[i] < least : () => false;
  const options = { outline: find("outline").checked, lines: find("lines").checked, hatched: rim === "hatched" ? isLow : null };
  const shownOnly = rim === "hidden" ? (colour) => (i) => (isLow(i) ? null : colour(i)) : (colour) => colour;
  const make = (colour, say) => new PatchLayer(layer, shownOnly(colour), say, options);
  if (show === "tissue") return renderTissue(layer, found.tissue, figure, make);
  if (show === "components") return renderComponents(layer, found.picture, figure, make);
  if (["domains", "clusters", "quality"].includes(show)) return renderLabels(shown, show, found.picture, figure, make);
  const { values, others, strata } = found;
  if (!values || !range) {
    noLegend(figure, subject ? `${subject.label} is not predicted here` : "nothing is predicted here");
    return null;
  }
  if (show === "blend" && others) {
    const mixed = mixture([subject, other], [values, others], [range, found.otherRange]);
    const grey = [subject, other].filter((each) => isAbstained(layer, each)).map((each) => each.label);
    const warning = grey.length ? ` The model abstains from ${grey.join(" and ")}: do not interpret.` : "";
    blendLegend(figure, mixed.legend, `Predicted.${warning}`);
    return make(mixed.colour, (i) => (Number.isNaN(values[i]) ? "no prediction" : mixed.say(i)));
  }
  const abstained = isAbstained(layer, subject);
  const map = abstained ? GREY : find("map").value;
  const colour = scaleColour(map, range);
  const by = layer.made_by?.preset ? ` by ${layer.made_by.preset}` : "";
  const why = abstained ? ", in grey, since the model abstains from it" : "";
  const what = show === "blend" ? "; choose a second gene to blend it with" : "";
  scaleLegend(figure, { map, range, unit: subject.unit(layer.unit), title: `${subject.label} predicted${by}${why}${what}` });
  return make((i) => colour(values[i]), sayValue(layer, subject, values, strata));
}

/** Whether the model abstains from a gene, or from all of a set: the trust is too low, so the prediction should not be used. */
export function isAbstained(layer, subject) {
  const { abstained, predicted } = trustOf(layer, subject);
  return predicted > 0 && abstained === predicted;
}

/** How many genes of a subject are predicted, and from how many of these the model abstains. */
export function trustOf(layer, subject) {
  const columns = (subject.genes ?? [subject.label]).filter((gene) => layer.column.has(gene)).map((gene) => layer.column.get(gene));
  return { predicted: columns.length, abstained: columns.filter((column) => layer.abstained?.[column] === true).length };
}

function sayValue(layer, subject, values, strata) {
  const widths = subject.isSet ? null : layer.half_widths?.[layer.column.get(subject.label)];
  return (i) => {
    if (Number.isNaN(values[i])) return "no prediction";
    const half = widths?.[strata ? strata[i] : 0];
    if (half === undefined) return `${subject.label} ${number(values[i])}`;
    const stratum = strata ? `, stratum ${strata[i] + 1} of ${widths.length} by predicted library size` : "";
    return `${subject.label} ${number(values[i])} ± ${number(half)} (${layer.interval})${stratum}`;
  };
}

function renderLabels(shown, show, found, figure, make) {
  const { layer } = shown;
  if (!found) {
    noLegend(figure, `no ${show} are known here`);
    return null;
  }
  const names = labelNames(layer, show);
  const items = names.map((name, label) => ({ label, name, colour: `rgb(${domainColour(label).join(" ")})` }));
  const hidden = shown.hiddenLabels(show);
  const onToggle = (label, isShown) => {
    if (isShown) hidden.delete(label);
    else hidden.add(label);
    shown.redraw();
  };
  labelLegend(figure, { items, hidden, onToggle, words: layer[`${show}_by`] ?? "" });
  if (show === "quality") {
    // Flags are bits, and the first that is set and not hidden gives the colour.
    const flag = (i) => names.findIndex((_, bit) => found[i] & (1 << bit) && !hidden.has(bit));
    const say = (i) => names.filter((_, bit) => found[i] & (1 << bit)).join(", ") || "no flag";
    return make((i) => (flag(i) < 0 ? null : domainColour(flag(i))), say);
  }
  const say = (i) => (found[i] < 0 ? `in no ${show.slice(0, -1)}` : names[found[i]]);
  return make((i) => (found[i] < 0 || hidden.has(found[i]) ? null : domainColour(found[i])), say);
}

function labelNames(layer, show) {
  if (show === "quality") return layer.quality;
  return Array.from({ length: layer[show] }, (_, label) => `${show.slice(0, -1)} ${label}`);
}

function renderComponents(layer, found, figure, make) {
  if (!found) {
    noLegend(figure, "the store holds no embeddings of this grid");
    return null;
  }
  noLegend(figure, layer.components);
  const rgb = (i) => (found[4 * i + 3] ? [found[4 * i], found[4 * i + 1], found[4 * i + 2]] : null);
  return make(rgb, (i) => (found[4 * i + 3] ? `components ${rgb(i).map((c) => (c / 255).toFixed(2)).join(", ")}` : "no embedding"));
}

function renderTissue(layer, found, figure, make) {
  if (!found) {
    noLegend(figure, "the tissue share is not known here");
    return null;
  }
  const map = find("map").value;
  const colour = scaleColour(map, [0, 1]);
  scaleLegend(figure, { map, range: [0, 1], unit: "share of the patch", title: "Tissue" });
  return make((i) => (found[i] ? colour(found[i] / 255) : null), (i) => `tissue share ${number(found[i] / 255)}`);
}
