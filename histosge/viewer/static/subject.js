// What is coloured: a gene, or a set of genes as the mean of their z-scores.

import { values, valuesOnce } from "./data.js";

const KEPT_SETS = 6;
const READERS = 4; // genes of a set that are read at once
export const MAX_SET = 500;

export class Subject {
  /**
   * @param label name of the gene, or of the set
   * @param genes of the set; null for a gene
   */
  constructor(label, genes = null) {
    this.label = label;
    this.genes = genes;
  }

  get isSet() {
    return this.genes !== null;
  }

  /** Whether a list of genes has it, or at least one of its genes. @param column Map of gene to number */
  isIn(column) {
    return Boolean(column) && (this.isSet ? this.genes.some((gene) => column.has(gene)) : column.has(this.label));
  }

  /** Its genes that a list does not have. */
  missingIn(column) {
    return (this.genes ?? [this.label]).filter((gene) => !column.has(gene));
  }

  unit(unit) {
    return this.isSet ? "mean z-score" : unit;
  }

  /** Read its values; null where there are none. @param base address below which each gene has a number */
  async read(base, column) {
    if (!this.isIn(column)) return null;
    return this.isSet ? meanOfZScores(this, base, column) : values(`${base}/${column.get(this.label)}.f16`);
  }
}

const sets = new Map();

function meanOfZScores(subject, base, column) {
  const numbers = subject.genes.filter((gene) => column.has(gene)).map((gene) => column.get(gene));
  const key = `${base} ${numbers.join(" ")}`;
  const found = sets.get(key) ?? computeMean(base, numbers);
  sets.delete(key);
  sets.set(key, found);
  found.catch(() => sets.delete(key));
  if (sets.size > KEPT_SETS) sets.delete(sets.keys().next().value);
  return found;
}

async function computeMean(base, numbers) {
  let [sum, used] = [null, 0];
  const queue = [...numbers];
  const work = async () => {
    for (let n = queue.shift(); n !== undefined; n = queue.shift()) {
      const found = await valuesOnce(`${base}/${n}.f16`);
      sum ??= new Float32Array(found.length);
      // A gene that is constant here has no z-score.
      if (addZScores(found, sum)) used++;
    }
  };
  await Promise.all(Array.from({ length: READERS }, work));
  return used ? sum.map((value) => value / used) : null;
}

/** Add the z-scores of values, over the finite ones; what is not finite stays so in the sum. */
function addZScores(found, sum) {
  let [n, mean, squares] = [0, 0, 0];
  for (const value of found) {
    if (!Number.isFinite(value)) continue;
    n++;
    const step = value - mean;
    mean += step / n;
    squares += step * (value - mean); // Welford (1962): exact however large the mean is
  }
  const sd = Math.sqrt(squares / n);
  if (!(sd > 0)) return false;
  for (let i = 0; i < found.length; i++) sum[i] += (found[i] - mean) / sd;
  return true;
}

/** The genes in a pasted text, each once. */
export function genesOf(text) {
  return [...new Set(text.split(/[\s,;"']+/).filter(Boolean))];
}
