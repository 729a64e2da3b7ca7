// What the page reads: JSON documents, arrays as they lie in the store, and pictures. All addresses are relative, so that a
// page of files works below any path. In a page of one file everything lies in the page itself, by the same names.

const HALF = float16Table();
const KEPT_ARRAYS = 48;
const arrays = new Map();
const EMBEDDED = readEmbedded();

/** Whether everything lies in this one file. */
export const isOneFile = EMBEDDED !== null;

function readEmbedded() {
  const found = document.getElementById("embedded");
  return found ? JSON.parse(found.textContent) : null;
}

/** Every float16 as a number: a table is faster than arithmetic, and not every browser knows float16 yet. */
function float16Table() {
  return Float32Array.from({ length: 65536 }, (_, bits) => {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 0x1f;
    const fraction = bits & 0x3ff;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  });
}

async function fetched(path, options) {
  const response = await fetch(path, options);
  if (response.ok) return response;
  const reason = await response.json().then((found) => found.error, () => response.statusText);
  throw new Error(`${path}: ${reason}`);
}

function embedded(path) {
  if (!Object.hasOwn(EMBEDDED, path)) throw new Error(`${path} is not in this page`);
  return EMBEDDED[path];
}

/** Read a JSON document. */
export async function readDocument(path) {
  return EMBEDDED ? embedded(path) : (await fetched(path)).json();
}

/** Send a JSON document and read the answer; only a live page has a server that computes. */
export async function post(path, content) {
  const headers = { "content-type": "application/json" };
  return (await fetched(path, { method: "POST", headers, body: JSON.stringify(content) })).json();
}

/** Read float16 values; the last ones read are kept. */
export function values(path) {
  return kept(path, asNumbers);
}

/** Read float16 values that are needed once, such as those of one gene of a large set. */
export async function valuesOnce(path) {
  return asNumbers(await buffer(path));
}

function asNumbers(found) {
  return Float32Array.from(new Uint16Array(found), (bits) => HALF[bits]);
}

/** Read int16 labels. */
export function labels(path) {
  return kept(path, (found) => new Int16Array(found));
}

/** Read bytes. */
export function bytes(path) {
  return kept(path, (found) => new Uint8Array(found));
}

/** The address of a picture: its own, or one that holds all of it. */
export function picture(path) {
  return EMBEDDED ? embedded(path.replace(/\?.*/, "")) : path;
}

/** Whether a picture is there; on a server, all are that the page asks for. */
export function hasPicture(path) {
  return !EMBEDDED || Object.hasOwn(EMBEDDED, path);
}

async function buffer(path) {
  if (!EMBEDDED) return (await fetched(path)).arrayBuffer();
  const text = atob(embedded(path));
  return Uint8Array.from(text, (letter) => letter.charCodeAt(0)).buffer;
}

function kept(path, decode) {
  const found = arrays.get(path) ?? buffer(path).then(decode);
  arrays.delete(path);
  arrays.set(path, found);
  found.catch(() => arrays.delete(path));
  if (arrays.size > KEPT_ARRAYS) arrays.delete(arrays.keys().next().value);
  return found;
}
