// Gene search: a combobox with a list of suggestions, after the WAI-ARIA pattern, worked by keyboard or pointer.

const SHOWN = 60;

export class GeneSearch {
  /**
   * @param input the text field, role combobox
   * @param list the list of suggestions, role listbox
   * @param choose called with a gene's name
   */
  constructor(input, list, choose) {
    this.input = input;
    this.list = list;
    this.choose = choose;
    this.genes = [];
    this.active = -1;
    input.addEventListener("input", () => this.suggest());
    input.addEventListener("focus", () => input.select());
    input.addEventListener("keydown", (event) => this.key(event));
    input.addEventListener("blur", () => this.close());
    list.addEventListener("pointerdown", (event) => {
      event.preventDefault(); // the field keeps the focus
      const option = event.target.closest("[role=option]");
      if (option) this.take(option.dataset.gene);
    });
  }

  /** Take a list of {name, note}. */
  setGenes(genes) {
    this.genes = genes.map((gene) => ({ ...gene, folded: gene.name.toLowerCase() }));
  }

  show(name) {
    this.input.value = name;
  }

  matches(text) {
    const folded = text.trim().toLowerCase();
    const begin = this.genes.filter((gene) => gene.folded.startsWith(folded));
    const within = folded ? this.genes.filter((gene) => gene.folded.indexOf(folded) > 0) : [];
    return [...begin, ...within];
  }

  suggest(text = this.input.value) {
    const found = this.matches(text);
    const options = found.slice(0, SHOWN).map((gene, i) => {
      const option = document.createElement("li");
      option.id = `${this.list.id}-option-${i}`;
      if (gene.abstained) option.className = "abstained";
      option.setAttribute("role", "option");
      option.setAttribute("aria-selected", "false");
      option.dataset.gene = gene.name;
      const note = document.createElement("span");
      note.className = "note";
      note.textContent = gene.note;
      option.append(gene.name, " ", note);
      return option;
    });
    this.list.replaceChildren(...options);
    if (found.length !== options.length || !found.length) {
      const rest = document.createElement("li");
      rest.className = "rest";
      rest.textContent = found.length ? `${found.length - SHOWN} more: go on typing` : "no such gene";
      rest.setAttribute("role", "presentation");
      this.list.append(rest);
    }
    this.list.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
    this.mark(options.length && text.trim() ? 0 : -1);
  }

  mark(index) {
    const options = this.list.querySelectorAll("[role=option]");
    options.forEach((option, i) => option.setAttribute("aria-selected", String(i === index)));
    this.active = index;
    if (index < 0) {
      this.input.removeAttribute("aria-activedescendant");
      return;
    }
    this.input.setAttribute("aria-activedescendant", options[index].id);
    options[index].scrollIntoView({ block: "nearest" });
  }

  key(event) {
    const options = this.list.querySelectorAll("[role=option]");
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (this.list.hidden) this.suggest("");
      else if (options.length) {
        const step = event.key === "ArrowDown" ? 1 : -1;
        this.mark((Math.max(this.active, step > 0 ? -1 : 0) + step + options.length) % options.length);
      }
    } else if (event.key === "Enter") {
      event.preventDefault();
      const option = this.list.hidden ? null : options[this.active];
      const exact = this.genes.find((gene) => gene.folded === this.input.value.trim().toLowerCase());
      if (option) this.take(option.dataset.gene);
      else if (exact) this.take(exact.name);
    } else if (event.key === "Escape") {
      this.close();
    }
  }

  take(name) {
    this.close();
    this.show(name);
    this.choose(name);
  }

  close() {
    this.list.hidden = true;
    this.active = -1;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
  }
}
