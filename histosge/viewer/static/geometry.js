// Outlines of regions: polygons in microns, each a list of rings, the outline and then its holes; and GeoJSON, in pixels of
// the slide's level 0, as QuPath writes and reads it.

const MAX_REGIONS = 100;
const MAX_CORNERS = 200000; // the server takes as many

/** Whether a place lies inside polygons, by the even-odd rule. */
export function isInside(polygons, x, y) {
  return polygons.some((rings) => {
    let inside = false;
    for (const ring of rings) {
      for (let i = 0, j = ring.length - 1; i < ring.length; j = i++) {
        const [[ax, ay], [bx, by]] = [ring[i], ring[j]];
        if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) inside = !inside;
      }
    }
    return inside;
  });
}

/** The corners that an outline needs, each at most `tolerance` from it (Douglas and Peucker). */
export function simplified(ring, tolerance) {
  if (ring.length < 4) return ring;
  const keep = new Uint8Array(ring.length);
  keep[0] = keep[ring.length - 1] = 1;
  const parts = [[0, ring.length - 1]];
  while (parts.length) {
    const [first, last] = parts.pop();
    let [furthest, most] = [-1, tolerance];
    for (let i = first + 1; i < last; i++) {
      const distance = distanceToLine(ring[i], ring[first], ring[last]);
      if (distance > most) [furthest, most] = [i, distance];
    }
    if (furthest < 0) continue;
    keep[furthest] = 1;
    parts.push([first, furthest], [furthest, last]);
  }
  return ring.filter((_, i) => keep[i]);
}

function distanceToLine([x, y], [ax, ay], [bx, by]) {
  const [dx, dy] = [bx - ax, by - ay];
  const long = Math.hypot(dx, dy);
  return long ? Math.abs(dy * (x - ax) - dx * (y - ay)) / long : Math.hypot(x - ax, y - ay);
}

/** Left, top, right and bottom of polygons. */
export function bounds(polygons) {
  const found = [Infinity, Infinity, -Infinity, -Infinity];
  for (const [outline] of polygons) {
    for (const [x, y] of outline) {
      found[0] = Math.min(found[0], x);
      found[1] = Math.min(found[1], y);
      found[2] = Math.max(found[2], x);
      found[3] = Math.max(found[3], y);
    }
  }
  return found;
}

/** The same region as text of whole microns, for an address. */
export function regionToText(region) {
  const polygons = region.polygons.map((rings) =>
    rings.map((ring) => ring.map(([x, y]) => `${Math.round(x)},${Math.round(y)}`).join(" ")).join("/"),
  );
  return `${region.name}|${polygons.join("|")}`;
}

/** A region out of such text; null where the text is none. */
export function regionFromText(text) {
  const [name, ...polygons] = text.split("|");
  const found = polygons.map((polygon) =>
    polygon.split("/").map((ring) => ring.split(" ").map((corner) => corner.split(",").map(Number))),
  );
  const isCorner = (corner) => corner.length === 2 && corner.every(Number.isFinite);
  const fits = found.length && found.every((rings) => rings.every((ring) => ring.length > 2 && ring.every(isCorner)));
  return fits ? { name, polygons: found } : null;
}

/**
 * Read regions from GeoJSON. Outlines of one name make one region.
 * @param text of a file
 * @param mpp microns per pixel at level 0
 * @returns {regions: [{name, polygons}], skipped: number of what is no polygon}
 */
export function regionsFromGeoJson(text, mpp) {
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    throw new Error("the file is no JSON; export annotations from QuPath as GeoJSON");
  }
  const features = Array.isArray(found) ? found : (found?.features ?? [found]);
  if (!Array.isArray(features)) throw new Error("the file holds no list of features");
  const named = new Map();
  let [skipped, corners] = [0, 0];
  for (const feature of features) {
    const polygons = polygonsOf(feature?.geometry ?? feature, mpp);
    if (!polygons.length) {
      skipped++;
      continue;
    }
    corners += polygons.flat().reduce((sum, ring) => sum + ring.length, 0);
    const properties = feature.properties ?? {};
    const name = String(properties.name ?? properties.classification?.name ?? "region").slice(0, 80);
    named.set(name, [...(named.get(name) ?? []), ...polygons]);
    if (named.size > MAX_REGIONS) throw new Error(`the file holds more than ${MAX_REGIONS} names; give at most as many`);
    if (corners > MAX_CORNERS) throw new Error(`the file has more than ${MAX_CORNERS} corners; simplify its outlines`);
  }
  if (!named.size) throw new Error("the file holds no polygon");
  return { regions: [...named].map(([name, polygons]) => ({ name, polygons })), skipped };
}

function polygonsOf(geometry, mpp) {
  if (geometry?.type === "GeometryCollection") return (geometry.geometries ?? []).flatMap((each) => polygonsOf(each, mpp));
  const found =
    geometry?.type === "Polygon" ? [geometry.coordinates] : geometry?.type === "MultiPolygon" ? geometry.coordinates : [];
  if (!Array.isArray(found)) return [];
  return found.map((rings) => (Array.isArray(rings) ? rings.map((ring) => ringInMicrons(ring, mpp)) : []))
    .filter((rings) => rings.length && rings.every((ring) => ring.length > 2));
}

function ringInMicrons(ring, mpp) {
  if (!Array.isArray(ring)) return [];
  const isCorner = (corner) => Array.isArray(corner) && Number.isFinite(corner[0]) && Number.isFinite(corner[1]);
  if (!ring.every(isCorner)) throw new Error("a polygon has corners that are no pairs of numbers");
  const corners = ring.map(([x, y]) => [x * mpp, y * mpp]);
  // GeoJSON repeats the first corner at the end.
  const [first, last] = [corners[0], corners[corners.length - 1]];
  return corners.length > 1 && first[0] === last[0] && first[1] === last[1] ? corners.slice(0, -1) : corners;
}

/** Regions as GeoJSON that QuPath opens as annotations on the slide. */
export function regionsToGeoJson(regions, mpp) {
  const pixel = (um) => Math.round((um / mpp) * 100) / 100;
  const closed = (ring) => [...ring, ring[0]].map(([x, y]) => [pixel(x), pixel(y)]);
  const features = regions.map(({ name, colour, polygons }) => {
    const coordinates = polygons.map((rings) => rings.map(closed));
    const one = coordinates.length === 1;
    return {
      type: "Feature",
      geometry: { type: one ? "Polygon" : "MultiPolygon", coordinates: one ? coordinates[0] : coordinates },
      properties: {
        objectType: "annotation",
        name,
        classification: { name, color: [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16)) },
        isLocked: false,
      },
    };
  });
  return JSON.stringify({ type: "FeatureCollection", features });
}
