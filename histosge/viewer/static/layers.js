// What is drawn over the H&E. A layer draws itself with `draw(context, view)`, answers `at(x, y)` in microns, and says in
// words what is there. `view` maps microns to pixels of the canvas: { left, top, scale, width, height }.

import { domainColour, place, table } from "./colours.js";

/** Patches of a grid, one value or label each. */
export class PatchLayer {
  /**
   * @param grid {shape: [rows, cols], origin_um: [x, y], step_um}
   * @param values one per patch, row-major; NaN, or a negative label, is left empty
   * @param colour value -> [red, green, blue]
   * @param say (value, number of the patch) -> words
   */
  constructor(grid, values, colour, say) {
    this.grid = grid;
    this.values = values;
    this.say = say;
    const [rows, cols] = grid.shape;
    this.image = document.createElement("canvas");
    this.image.width = cols;
    this.image.height = rows;
    const pixels = new ImageData(cols, rows);
    for (let i = 0; i < values.length; i++) {
      const rgb = colour(values[i]);
      if (!rgb) continue;
      pixels.data[4 * i] = rgb[0];
      pixels.data[4 * i + 1] = rgb[1];
      pixels.data[4 * i + 2] = rgb[2];
      pixels.data[4 * i + 3] = 255;
    }
    this.image.getContext("2d").putImageData(pixels, 0, 0);
  }

  draw(context, view) {
    const { shape, origin_um, step_um } = this.grid;
    context.imageSmoothingEnabled = false;
    context.drawImage(
      this.image,
      view.left + origin_um[0] * view.scale,
      view.top + origin_um[1] * view.scale,
      shape[1] * step_um * view.scale,
      shape[0] * step_um * view.scale,
    );
  }

  /** The patch at a place, or null. */
  at(x, y) {
    const { shape, origin_um, step_um } = this.grid;
    const [row, col] = [Math.floor((y - origin_um[1]) / step_um), Math.floor((x - origin_um[0]) / step_um)];
    if (row < 0 || col < 0 || row >= shape[0] || col >= shape[1]) return null;
    const patch = row * shape[1] + col;
    const value = this.values[patch];
    const box = [origin_um[0] + col * step_um, origin_um[1] + row * step_um, step_um, step_um];
    return { words: `patch row ${row}, column ${col}: ${this.say(value, patch)}`, value, box };
  }
}

const MANY = 20000; // spots: more are drawn once, as a picture, unless one looks closely
const CLOSE_PX = 4; // radius on the screen from which on spots are drawn one by one
const PICTURE_PX = 4096; // longest side of that picture

/** Measured spots, discs of their true size; squares where they are too many or too small for discs. */
export class SpotLayer {
  /**
   * @param spots {xy_um, diameter_um, barcodes or null}
   * @param values one per spot
   * @param colour value -> [red, green, blue]
   * @param say value -> words
   */
  constructor(spots, values, colour, say) {
    this.spots = spots;
    this.values = values;
    this.say = say;
    this.colours = Array.from(values, (value) => {
      const rgb = colour(value);
      return rgb && `rgb(${rgb.join(" ")})`;
    });
    // Low ones first, so that a high one is not hidden where spots overlap.
    this.order = Uint32Array.from(values.keys()).sort((a, b) => values[a] - values[b]);
    this.picture = null;
  }

  draw(context, view) {
    if (this.order.length > MANY && (this.spots.diameter_um / 2) * view.scale < CLOSE_PX) {
      this.picture ??= this.drawPicture();
      const { left, top, width, height } = this.picture.place;
      const [x, y] = [view.left + left * view.scale, view.top + top * view.scale];
      context.drawImage(this.picture.image, x, y, width * view.scale, height * view.scale);
      return;
    }
    this.drawSpots(context, view, Math.max(1.5, (this.spots.diameter_um / 2) * view.scale));
  }

  drawPicture() {
    const { xy_um, diameter_um } = this.spots;
    const [low, high] = [[Infinity, Infinity], [-Infinity, -Infinity]];
    for (const place of xy_um) {
      for (const axis of [0, 1]) {
        low[axis] = Math.min(low[axis], place[axis] - diameter_um);
        high[axis] = Math.max(high[axis], place[axis] + diameter_um);
      }
    }
    const place = { left: low[0], top: low[1], width: high[0] - low[0], height: high[1] - low[1] };
    const scale = Math.min(2 / diameter_um, PICTURE_PX / Math.max(place.width, place.height));
    const image = document.createElement("canvas");
    image.width = Math.ceil(place.width * scale);
    image.height = Math.ceil(place.height * scale);
    const view = { left: -low[0] * scale, top: -low[1] * scale, scale, width: image.width, height: image.height };
    this.drawSpots(image.getContext("2d"), view, Math.max(0.5, (diameter_um / 2) * scale));
    return { image, place };
  }

  drawSpots(context, view, radius) {
    const asSquares = this.order.length > MANY || radius < 2;
    for (const i of this.order) {
      const x = view.left + this.spots.xy_um[i][0] * view.scale;
      const y = view.top + this.spots.xy_um[i][1] * view.scale;
      if (x < -radius || y < -radius || x > view.width + radius || y > view.height + radius) continue;
      if (!this.colours[i]) continue;
      context.fillStyle = this.colours[i];
      if (asSquares) {
        context.fillRect(x - radius, y - radius, 2 * radius, 2 * radius);
        continue;
      }
      context.beginPath();
      context.arc(x, y, radius, 0, 2 * Math.PI);
      context.fill();
    }
  }

  /** The spot whose disc holds a place, or null. */
  at(x, y) {
    const radius = this.spots.diameter_um / 2;
    let [nearest, best] = [-1, radius * radius];
    for (let i = 0; i < this.spots.xy_um.length; i++) {
      const [dx, dy] = [this.spots.xy_um[i][0] - x, this.spots.xy_um[i][1] - y];
      if (dx * dx + dy * dy <= best) [nearest, best] = [i, dx * dx + dy * dy];
    }
    if (nearest < 0) return null;
    const [cx, cy] = this.spots.xy_um[nearest];
    const value = this.values[nearest];
    const box = [cx - radius, cy - radius, 2 * radius, 2 * radius];
    return { words: `spot ${this.spots.barcodes?.[nearest] ?? nearest}: ${this.say(value)}`, value, box };
  }
}

/** Return value -> colour over a range, nothing for NaN. */
export function scaleColour(map, [low, high]) {
  const colours = table(map);
  const entries = Array.from({ length: 256 }, (_, i) => [colours[3 * i], colours[3 * i + 1], colours[3 * i + 2]]);
  return (value) => (Number.isNaN(value) ? null : entries[place(value, low, high)]);
}

/** Return label -> colour, nothing for negative ones. */
export function labelColour(label) {
  return label < 0 ? null : domainColour(label);
}
