// The genes of a region as a table: mean inside, mean of the rest, difference, effect size; sorted by a click on a heading.

import { counted, element } from "./elements.js";
import { number } from "./legend.js";

const ROWS = 200; // more are in the CSV
const COLUMNS = [
  ["gene", "Gene", "name of the gene"],
  ["mean", "In", "mean in the region"],
  ["rest", "Rest", "mean of what it is compared with"],
  ["difference", "Diff.", "difference of the two means"],
  ["effect", "Effect", "Cohen's d: the difference over the pooled standard deviation"],
];

export class GeneTable {
  constructor(host, onGene) {
    this.host = host;
    this.onGene = onGene;
    this.sort = { by: "difference", down: true };
    this.clear();
  }

  clear() {
    this.tables = {};
    this.compared = {};
    this.host.replaceChildren();
  }

  /** Take the answer to a comparison of region `one` with region `other`, null for the rest. */
  take(found, { layer, spots }, one, other) {
    const genes = { predicted: layer?.genes, measured: spots?.genes };
    this.tables = {};
    for (const kind of ["predicted", "measured"]) if (found[kind] && genes[kind]) this.tables[kind] = rowsOf(found[kind], genes[kind]);
    // What was measured needs no trust.
    this.tables.predicted?.forEach((row, i) => Object.assign(row, { trust: layer.trust?.[i] ?? null, abstained: layer.abstained?.[i] ?? null }));
    this.counts = found;
    this.compared = other ? { mean: one, rest: other } : {};
  }

  /** Show "predicted" or "measured". */
  show(kind) {
    this.kind = kind;
    const rows = this.sorted(this.tables[kind] ?? []);
    const head = element("tr", "", ...COLUMNS.map((column) => this.heading(column)));
    const body = rows.slice(0, ROWS).map((row) => this.row(row));
    const table = element("table", "", element("thead", "", head), element("tbody", "", ...body));
    const rest = rows.length > ROWS ? [element("p", "hint", `${rows.length - ROWS} more genes are in the CSV.`)] : [];
    const grey = rows.filter((row) => row.abstained).length;
    const abstained = grey ? [element("p", "hint", `In grey: ${counted(grey, "gene")} from which the model abstains: not to be interpreted.`)] : [];
    this.host.replaceChildren(...abstained, table, ...rest);
  }

  heading([key, text, meaning]) {
    const cell = element("th");
    const { by, down } = this.sort;
    const region = this.compared[key];
    const press = element("button", "", element("span", "", region ?? text), by === key ? (down ? " ▼" : " ▲") : "");
    press.type = "button";
    press.title = region ? `mean in ${region}` : meaning;
    press.addEventListener("click", () => {
      this.sort = { by: key, down: by === key ? !down : key !== "gene" };
      this.show(this.kind);
    });
    cell.append(press);
    cell.setAttribute("aria-sort", by !== key ? "none" : down ? "descending" : "ascending");
    return cell;
  }

  row(row) {
    const choose = element("button", "link", row.gene);
    choose.type = "button";
    choose.addEventListener("click", () => this.onGene(row.gene));
    const numbers = COLUMNS.slice(1).map(([key]) => element("td", "", row[key] === null ? "–" : number(row[key])));
    if (row.abstained) choose.title = "the model abstains from this gene: do not interpret it";
    return element("tr", row.abstained ? "abstained" : "", element("td", "", choose), ...numbers);
  }

  sorted(rows) {
    const { by, down } = this.sort;
    const sign = down ? -1 : 1;
    const order = (a, b) => {
      if (by === "gene") return sign * a.gene.localeCompare(b.gene);
      if (a[by] === null || b[by] === null) return (a[by] === null) - (b[by] === null); // unknown ones last
      return sign * (a[by] - b[by]);
    };
    return [...rows].sort(order);
  }
}

function rowsOf(found, genes) {
  return genes.map((gene, i) => ({
    gene,
    mean: found.mean[i],
    rest: found.rest[i],
    difference: found.difference[i],
    effect: found.effect[i],
  }));
}

/** All rows of a table, measured and predicted side by side, as CSV. */
export function tableAsCsv(table, slide, one, other) {
  const kinds = ["measured", "predicted"].filter((kind) => table.tables[kind]);
  const byName = kinds.map((kind) => new Map(table.tables[kind].map((row) => [row.gene, row])));
  const names = [...new Set(byName.flatMap((rows) => [...rows.keys()]))];
  const keys = ["mean", "rest", "difference", "effect"];
  const head = ["slide", "region", "compared_with", "gene"];
  for (const kind of kinds) head.push(`${kind}_n`, `${kind}_n_rest`, ...keys.map((key) => `${kind}_${key}`));
  const isPredicted = kinds.includes("predicted");
  if (isPredicted) head.push("predicted_trust", "model_abstains");
  const lines = names.map((name) => {
    const cells = [slide, one, other, name];
    kinds.forEach((kind, i) => {
      const row = byName[i].get(name);
      const { n, n_rest } = table.counts[kind];
      cells.push(...(row ? [n, n_rest, ...keys.map((key) => row[key] ?? "")] : ["", "", "", "", "", ""]));
    });
    if (isPredicted) cells.push(...trustOf(byName[kinds.indexOf("predicted")].get(name)));
    return cells.map(cell).join(",");
  });
  return [head.join(","), ...lines].join("\r\n") + "\r\n";
}

function trustOf(row) {
  const abstains = row?.abstained == null ? "" : row.abstained ? "yes" : "no";
  return [row?.trust ?? "", abstains];
}

function cell(value) {
  if (typeof value === "number") return String(value);
  // A text that begins like a formula would be computed by a spreadsheet.
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
