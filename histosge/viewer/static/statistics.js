// Means of genes in a region, where no server computes them: of the genes that the page holds. The same numbers and the same
// names as the server's (histosge/viewer/region_means.py).

import { valuesOnce } from "./data.js";
import { isInside } from "./geometry.js";

/** Compare a region with another one, or with the rest where there is none. */
export async function compareHere({ layer, spots, base }, region, other) {
  const found = { predicted: null, measured: null };
  if (layer?.genes.length) {
    const { shape, origin_um, step_um } = layer;
    const place = (i) => [
      origin_um[0] + ((i % shape[1]) + 0.5) * step_um,
      origin_um[1] + (Math.floor(i / shape[1]) + 0.5) * step_um,
    ];
    const groups = groupsOf(shape[0] * shape[1], place, region, other);
    found.predicted = await compareGenes(layer.genes, (i) => `${layer.base}/genes/${i}.f16`, groups);
  }
  if (spots) {
    const groups = groupsOf(spots.xy_um.length, (i) => spots.xy_um[i], region, other);
    found.measured = await compareGenes(spots.genes, (i) => `${base}/spots/${i}.f16`, groups);
  }
  return found;
}

/** For each place 1 inside, 2 outside or in the other region, 3 in both regions, 0 in none. */
function groupsOf(n, place, region, other) {
  return Uint8Array.from({ length: n }, (_, i) => {
    const [x, y] = place(i);
    const inside = isInside(region.polygons, x, y);
    const outside = other ? isInside(other.polygons, x, y) : !inside;
    return (inside ? 1 : 0) + (outside ? 2 : 0);
  });
}

async function compareGenes(genes, path, groups) {
  const found = { n: 0, n_rest: 0, mean: [], rest: [], difference: [], effect: [] };
  for (let gene = 0; gene < genes.length; gene++) {
    const values = await valuesOnce(path(gene));
    const [inside, rest] = [moments(values, groups, 1), moments(values, groups, 2)];
    const difference = inside.mean - rest.mean;
    const degrees = inside.n + rest.n - 2;
    const pooled = Math.sqrt((inside.squares + rest.squares) / Math.max(degrees, 1));
    found.n = inside.n;
    found.n_rest = rest.n;
    found.mean.push(orNull(inside.mean));
    found.rest.push(orNull(rest.mean));
    found.difference.push(orNull(difference));
    found.effect.push(inside.n > 1 && rest.n > 1 && pooled > 0 ? orNull(difference / pooled) : null);
  }
  return found;
}

/** Count, mean and sum of squared deviations of the finite values of one group. */
function moments(values, groups, group) {
  let [n, sum] = [0, 0];
  for (let i = 0; i < values.length; i++) {
    if (groups[i] & group && Number.isFinite(values[i])) [n, sum] = [n + 1, sum + values[i]];
  }
  const mean = n ? sum / n : NaN;
  let squares = 0;
  for (let i = 0; i < values.length; i++) {
    if (groups[i] & group && Number.isFinite(values[i])) squares += (values[i] - mean) ** 2;
  }
  return { n, mean, squares };
}

function orNull(value) {
  return Number.isFinite(value) ? Math.round(value * 1e5) / 1e5 : null;
}
