// What the page reads: JSON documents, and arrays as they lie in the store. All addresses are relative, so that a page of
// files works below any path.

const HALF = halves();
const KEPT_ARRAYS = 48;
const arrays = new Map();

/** Every float16 as a number: a table is faster than arithmetic, and not every browser knows float16 yet. */
function halves() {
  return Float32Array.from({ length: 65536 }, (_, bits) => {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 0x1f;
    const fraction = bits & 0x3ff;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  });
}

async function fetched(path) {
  const response = await fetch(path);
  if (response.ok) return response;
  const reason = await response.json().then((found) => found.error, () => response.statusText);
  throw new Error(`${path}: ${reason}`);
}

/** Read a JSON document. */
export async function document_(path) {
  return (await fetched(path)).json();
}

/** Read float16 values; the last ones read are kept. */
export function values(path) {
  return kept(path, (buffer) => Float32Array.from(new Uint16Array(buffer), (bits) => HALF[bits]));
}

/** Read int16 labels. */
export function labels(path) {
  return kept(path, (buffer) => new Int16Array(buffer));
}

function kept(path, decode) {
  const found = arrays.get(path) ?? fetched(path).then((r) => r.arrayBuffer()).then(decode);
  arrays.delete(path);
  arrays.set(path, found);
  found.catch(() => arrays.delete(path));
  if (arrays.size > KEPT_ARRAYS) arrays.delete(arrays.keys().next().value);
  return found;
}
