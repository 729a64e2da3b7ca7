// What is drawn over the H&E. A layer draws itself with `draw(context, view)`, answers `at(x, y)` in microns, and says in
// words what is there. `view` maps microns to pixels of the canvas: { left, top, scale, width, height }.

import { place, table } from "./colours.js";

const HATCH_PX = 6; // distance of the lines over patches with little tissue
const LEAST_STEP_PX = 5; // of patches whose grid is drawn: closer lines hide what lies under them

/** Patches of a grid, a colour each. */
export class PatchLayer {
  /**
   * @param grid {shape: [rows, cols], origin_um: [x, y], step_um}
   * @param colour number of the patch, row-major -> [red, green, blue], or null where it is left empty
   * @param say number of the patch -> words
   * @param options {outline, lines, hatched}: whether the edge and the grid are drawn, and number of the patch -> whether it
   *   is hatched
   */
  constructor(grid, colour, say, options = {}) {
    this.grid = grid;
    this.say = say;
    const [rows, cols] = grid.shape;
    this.image = document.createElement("canvas");
    this.image.width = cols;
    this.image.height = rows;
    const pixels = new ImageData(cols, rows);
    for (let i = 0; i < rows * cols; i++) {
      const rgb = colour(i);
      if (rgb) pixels.data.set([rgb[0], rgb[1], rgb[2], 255], 4 * i);
    }
    this.image.getContext("2d").putImageData(pixels, 0, 0);
    const drawn = (i) => pixels.data[4 * i + 3] > 0;
    this.lines = options.lines ?? false;
    this.edge = options.outline ? edgePath(rows, cols, drawn) : null;
    this.hatch = options.hatched ? cellPath(rows, cols, (i) => drawn(i) && options.hatched(i)) : null;
  }

  draw(context, view) {
    const { shape, origin_um, step_um } = this.grid;
    const [left, top, step] = [view.left + origin_um[0] * view.scale, view.top + origin_um[1] * view.scale, step_um * view.scale];
    context.imageSmoothingEnabled = false;
    context.drawImage(this.image, left, top, shape[1] * step, shape[0] * step);
    if (this.hatch) this.drawHatch(context, view, left, top, step);
    if (this.lines && step >= LEAST_STEP_PX) this.drawLines(context, view, left, top, step);
    if (this.edge) this.drawEdge(context, left, top, step);
  }

  /** The borders of patches, where they are in sight. */
  drawLines(context, view, left, top, step) {
    const [rows, cols] = this.grid.shape;
    const [right, bottom] = [Math.min(view.width, left + cols * step), Math.min(view.height, top + rows * step)];
    context.strokeStyle = "rgb(20 24 29 / 45%)";
    context.lineWidth = 1;
    context.beginPath();
    for (let col = Math.max(0, Math.ceil(-left / step)); col <= cols && left + col * step <= right + 1; col++) {
      context.moveTo(left + col * step, Math.max(0, top));
      context.lineTo(left + col * step, bottom);
    }
    for (let row = Math.max(0, Math.ceil(-top / step)); row <= rows && top + row * step <= bottom + 1; row++) {
      context.moveTo(Math.max(0, left), top + row * step);
      context.lineTo(right, top + row * step);
    }
    context.stroke();
  }

  drawHatch(context, view, left, top, step) {
    context.save();
    const plain = context.getTransform();
    context.translate(left, top);
    context.scale(step, step);
    context.clip(this.hatch);
    context.setTransform(plain);
    for (const [colour, shift] of [["rgb(255 255 255 / 80%)", 0], ["rgb(0 0 0 / 70%)", 1]]) {
      context.strokeStyle = colour;
      context.lineWidth = 1;
      context.beginPath();
      for (let x = -view.height; x < view.width; x += HATCH_PX) {
        context.moveTo(x + shift, 0);
        context.lineTo(x + shift + view.height, view.height);
      }
      context.stroke();
    }
    context.restore();
  }

  /** The edge of what is drawn, so that low values are seen on purple tissue, too. */
  drawEdge(context, left, top, step) {
    context.save();
    context.translate(left, top);
    context.scale(step, step);
    for (const [colour, width] of [["#ffffff", 2.5], ["#14181d", 1]]) {
      context.strokeStyle = colour;
      context.lineWidth = width / step;
      context.stroke(this.edge);
    }
    context.restore();
  }

  /** The patch at a place, or null. */
  at(x, y) {
    const { shape, origin_um, step_um } = this.grid;
    const [row, col] = [Math.floor((y - origin_um[1]) / step_um), Math.floor((x - origin_um[0]) / step_um)];
    if (row < 0 || col < 0 || row >= shape[0] || col >= shape[1]) return null;
    const box = [origin_um[0] + col * step_um, origin_um[1] + row * step_um, step_um, step_um];
    return { words: `patch row ${row}, column ${col}: ${this.say(row * shape[1] + col)}`, box };
  }
}

/** Runs of cells that fulfil a condition, as a path in units of cells. */
function cellPath(rows, cols, wanted) {
  const path = new Path2D();
  for (let row = 0; row < rows; row++) {
    for (let col = 0; col < cols; col++) {
      const start = col;
      while (col < cols && wanted(row * cols + col)) col++;
      if (col > start) path.rect(start, row, col - start, 1);
    }
  }
  return path;
}

/** The border between cells that fulfil a condition and others, as a path in units of cells. */
export function edgePath(rows, cols, wanted) {
  const path = new Path2D();
  const inside = (row, col) => row >= 0 && col >= 0 && row < rows && col < cols && wanted(row * cols + col);
  const lines = (n, m, differs, move) => {
    for (let i = 0; i <= n; i++) {
      for (let j = 0; j < m; j++) {
        const start = j;
        while (j < m && differs(i, j)) j++;
        if (j > start) move(i, start, j);
      }
    }
  };
  lines(rows, cols, (row, col) => inside(row - 1, col) !== inside(row, col), (row, from, to) => {
    path.moveTo(from, row);
    path.lineTo(to, row);
  });
  lines(cols, rows, (col, row) => inside(row, col - 1) !== inside(row, col), (col, from, to) => {
    path.moveTo(col, from);
    path.lineTo(col, to);
  });
  return path;
}

const MANY = 20000; // spots: more are drawn once, as a picture, unless one looks closely
const CLOSE_PX = 4; // radius on the screen from which on spots are drawn one by one
const PICTURE_PX = 4096; // longest side of that picture

/** Measured spots, discs of their true size unless another is chosen; squares where they are too many or too small. */
export class SpotLayer {
  /**
   * @param spots {xy_um, diameter_um, barcodes or null}
   * @param order numbers of the spots, the topmost last
   * @param colour number of the spot -> [red, green, blue], or null where it is left out
   * @param say number of the spot -> words
   * @param options {size, outline}: times the true diameter, and whether discs have a rim
   */
  constructor(spots, order, colour, say, options = {}) {
    this.spots = spots;
    this.order = order;
    this.say = say;
    this.size = options.size ?? 1;
    this.outline = options.outline ?? false;
    this.colours = Array.from(spots.xy_um, (_, i) => {
      const rgb = colour(i);
      return rgb && `rgb(${rgb.join(" ")})`;
    });
    this.picture = null;
  }

  get radius_um() {
    return (this.spots.diameter_um / 2) * this.size;
  }

  draw(context, view) {
    if (this.order.length > MANY && this.radius_um * view.scale < CLOSE_PX) {
      this.picture ??= this.drawPicture();
      const { left, top, width, height } = this.picture.place;
      const [x, y] = [view.left + left * view.scale, view.top + top * view.scale];
      context.drawImage(this.picture.image, x, y, width * view.scale, height * view.scale);
      return;
    }
    this.drawSpots(context, view, Math.max(1.5, this.radius_um * view.scale));
  }

  drawPicture() {
    const { xy_um } = this.spots;
    const diameter = 2 * this.radius_um;
    const [low, high] = [[Infinity, Infinity], [-Infinity, -Infinity]];
    for (const place of xy_um) {
      for (const axis of [0, 1]) {
        low[axis] = Math.min(low[axis], place[axis] - diameter);
        high[axis] = Math.max(high[axis], place[axis] + diameter);
      }
    }
    const place = { left: low[0], top: low[1], width: high[0] - low[0], height: high[1] - low[1] };
    const scale = Math.min(2 / diameter, PICTURE_PX / Math.max(place.width, place.height));
    const image = document.createElement("canvas");
    image.width = Math.ceil(place.width * scale);
    image.height = Math.ceil(place.height * scale);
    const view = { left: -low[0] * scale, top: -low[1] * scale, scale, width: image.width, height: image.height };
    this.drawSpots(image.getContext("2d"), view, Math.max(0.5, (diameter / 2) * scale));
    return { image, place };
  }

  drawSpots(context, view, radius) {
    const asSquares = this.order.length > MANY || radius < 2;
    context.strokeStyle = "#ffffff";
    context.lineWidth = Math.min(1.2, radius / 5);
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
      if (this.outline) context.stroke();
    }
  }

  /** The spot whose disc holds a place, or null. */
  at(x, y) {
    const radius = this.radius_um;
    let [nearest, best] = [-1, radius * radius];
    for (let i = 0; i < this.spots.xy_um.length; i++) {
      const [dx, dy] = [this.spots.xy_um[i][0] - x, this.spots.xy_um[i][1] - y];
      if (dx * dx + dy * dy <= best) [nearest, best] = [i, dx * dx + dy * dy];
    }
    if (nearest < 0) return null;
    const [cx, cy] = this.spots.xy_um[nearest];
    const box = [cx - radius, cy - radius, 2 * radius, 2 * radius];
    return { words: `spot ${this.spots.barcodes?.[nearest] ?? nearest}: ${this.say(nearest)}`, box };
  }
}

/** Numbers of the spots, low values first, so that a high one is not hidden where spots overlap. */
export function lowFirst(values) {
  return Uint32Array.from(values.keys()).sort((a, b) => values[a] - values[b]);
}

/** Return value -> colour over a range, nothing for NaN. */
export function scaleColour(map, [low, high]) {
  const colours = table(map);
  const entries = Array.from({ length: 256 }, (_, i) => [colours[3 * i], colours[3 * i + 1], colours[3 * i + 2]]);
  return (value) => (Number.isNaN(value) ? null : entries[place(value, low, high)]);
}
