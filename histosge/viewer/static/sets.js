// Gene sets: pasted ones, and named ones from the files that the page was given.

import { readDocument } from "./data.js";
import { find } from "./elements.js";
import { MAX_SET, Subject, genesOf } from "./subject.js";

const SHOWN_MISSING = 8;

export class GeneSets {
  /** @param onShow called with a Subject */
  constructor(onShow) {
    this.onShow = onShow;
    this.named = new Map();
    find("show-set").addEventListener("click", () => this.show());
    find("set-choice").addEventListener("change", () => this.take(find("set-choice").value));
  }

  /** Read the named sets. */
  async read() {
    const found = await readDocument("data/gene-sets.json");
    this.named = new Map(found.sets.map(({ name, genes }) => [name, genes]));
    find("named-sets").hidden = !this.named.size;
    find("set-names").replaceChildren(...[...this.named.keys()].map((name) => new Option(name, name)));
  }

  take(name) {
    const genes = this.named.get(name);
    if (!genes) return void (find("set-found").textContent = name ? "There is no set of this name." : "");
    find("set-name").value = name;
    find("set-genes").value = genes.join(" ");
    this.show();
  }

  show() {
    const genes = genesOf(find("set-genes").value);
    const said = find("set-found");
    if (!genes.length) return void (said.textContent = "Paste the names of some genes first.");
    if (genes.length > MAX_SET) return void (said.textContent = `${genes.length} genes are too many; give at most ${MAX_SET}.`);
    this.onShow(new Subject(find("set-name").value.trim() || "my set", genes));
  }

  /** Say how much of a set the slide has. */
  describe(subject, layer, spots) {
    if (!subject?.isSet) return void (find("set-found").textContent = "");
    const said = [];
    for (const [what, column] of [["predicted", layer?.column], ["measured", spots?.column]]) {
      if (!column) continue;
      const missing = subject.missingIn(column);
      const names = missing.slice(0, SHOWN_MISSING).join(", ") + (missing.length > SHOWN_MISSING ? ", …" : "");
      said.push(`${subject.genes.length - missing.length} of ${subject.genes.length} genes are ${what}${missing.length ? ` (not: ${names})` : ""}.`);
    }
    find("set-found").textContent = said.join(" ");
  }
}
