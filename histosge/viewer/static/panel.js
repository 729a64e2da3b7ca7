// One view of a slide: the H&E in OpenSeadragon and a canvas over it. Places are in microns from the slide's top-left.

/* global OpenSeadragon */

import { hasPicture, picture as pictureAddress } from "./data.js";

const SHARPEST = 8; // screen pixels per pixel of the picture, at most
const SPARE = 0.5; // tiles are not asked for when the picture is shown smaller than this share of its coarsest level

export class Panel {
  /**
   * @param host the element that becomes the view
   * @param label what a screen reader calls it
   * @param onLook called with (panel, {x, y} or null) when a place is pointed at
   */
  constructor(host, label, onLook) {
    this.host = host;
    this.onLook = onLook;
    this.layer = null;
    this.opacity = 1;
    this.spotlight = null;
    this.regions = [];
    this.draft = null; // corners of a region that is being drawn
    this.followers = [];
    this.target = null; // what a link has named, until somebody moves the view
    this.isHome = false; // the whole slide is shown, and nobody has looked closer since
    this.viewer = OpenSeadragon({
      element: host,
      drawer: "canvas",
      showNavigationControl: false,
      visibilityRatio: 0.3,
      maxZoomPixelRatio: SHARPEST,
      minZoomImageRatio: 0.6,
      animationTime: 0.4,
      springStiffness: 9,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      imageLoaderLimit: 6,
      timeout: 120000,
    });
    this.canvas = document.createElement("canvas");
    this.canvas.className = "overlay";
    this.canvas.setAttribute("aria-hidden", "true");
    host.append(this.canvas);
    const focus = this.viewer.canvas;
    focus.setAttribute("role", "application");
    focus.setAttribute("aria-label", `${label}. Arrow keys move, plus and minus zoom, 0 shows all; the value at the cross is read out.`);
    focus.setAttribute("aria-describedby", "readout");
    // Turning and mirroring are left out: what is drawn over the slide would not follow.
    this.viewer.addHandler("canvas-key", (event) => {
      if (/^[rfjn0]$/i.test(event.originalEvent.key)) event.preventDefaultAction = true;
      else this.setHome(false);
      if (event.originalEvent.key === "0") this.home();
    });
    this.viewer.addHandler("update-viewport", () => this.paint());
    this.viewer.addHandler("viewport-change", () => this.moved());
    this.viewer.addHandler("animation-finish", () => this.keyboard && this.look(this.centre()));
    this.viewer.addHandler("resize", () => requestAnimationFrame(() => this.resized()));
    for (const kind of ["canvas-scroll", "canvas-drag", "canvas-pinch", "canvas-double-click"]) {
      this.viewer.addHandler(kind, () => this.setHome(false));
    }
    for (const kind of ["pointerenter", "pointerdown", "wheel", "keydown"]) {
      this.host.addEventListener(kind, () => this.lead(), { capture: true, passive: true });
    }
    focus.addEventListener("pointermove", (event) => this.pointed(event));
    focus.addEventListener("pointerleave", () => this.look(null));
    focus.addEventListener("focus", () => {
      this.keyboard = focus.matches(":focus-visible");
      if (this.keyboard && this.slide) this.look(this.centre());
    });
    focus.addEventListener("blur", () => {
      this.keyboard = false;
      this.look(null);
    });
  }

  /** Show a slide: its thumbnail at once, its tiles over it. */
  open(slide, base) {
    this.slide = slide;
    this.viewer.world.removeAll();
    this.picture = null;
    const width = slide.size_um[0];
    const small = slide.thumbnail;
    const ready = new Promise((done) => {
      if (!small) return done();
      this.viewer.addTiledImage({
        tileSource: { type: "image", url: pictureAddress(`${base}/thumbnail.png`), buildPyramid: false },
        x: small.origin_um[0] / width,
        y: small.origin_um[1] / width,
        width: (small.shape[1] * small.step_um) / width,
        success: () => done(),
        error: () => done(),
      });
    });
    return ready.then(() => this.home(true));
  }

  /** Lay the tiles of the H&E over the thumbnail. */
  addPicture(picture, base) {
    const tiles = {
      width: picture.width,
      height: picture.height,
      tileSize: picture.tile_px,
      tileOverlap: 0,
      minLevel: picture.min_level,
      maxLevel: picture.max_level,
      getTileUrl: (level, x, y) => pictureAddress(`${base}/tiles/${level}/${x}_${y}.jpg?v=${picture.version}`),
      // A tile that could not be read is left out of a page of one file.
      tileExists: (level, x, y) => inLevel(picture, level, x, y) && hasPicture(`${base}/tiles/${level}/${x}_${y}.jpg`),
    };
    // Where even the coarsest tiles are too many for a whole slide, the thumbnail serves until one looks closer.
    this.coarsest = picture.min_level > 0 ? picture.width / 2 ** (picture.max_level - picture.min_level) : 0;
    return new Promise((done) => {
      this.viewer.addTiledImage({
        tileSource: tiles,
        x: 0,
        y: 0,
        width: 1,
        opacity: 0,
        success: ({ item }) => {
          this.picture = item;
          this.chooseTiles();
          done();
        },
        error: () => done(),
      });
    });
  }

  /** Resolves once all tiles that are in sight are drawn. */
  sharp() {
    const { picture } = this;
    return new Promise((done) => {
      if (!picture || picture.getFullyLoaded()) done();
      else picture.addOnceHandler("fully-loaded-change", () => done());
    });
  }

  chooseTiles() {
    if (!this.picture) return;
    const shown = this.viewer.viewport.getZoom(true) * this.host.clientWidth;
    const wanted = shown >= this.coarsest * SPARE ? 1 : 0;
    if (this.picture.getOpacity() !== wanted) this.picture.setOpacity(wanted);
  }

  setLayer(layer) {
    this.layer = layer;
    this.paint();
  }

  setOpacity(opacity) {
    this.opacity = opacity;
    this.paint();
  }

  /** Outline a place, here or because it is pointed at in the other view. */
  setSpotlight(spotlight) {
    this.spotlight = spotlight;
    this.paint();
  }

  /** Show regions' outlines. */
  setRegions(regions) {
    this.regions = regions;
    this.paint();
  }

  /** Show the corners of a region that is being drawn; null for none. */
  setDraft(corners) {
    this.draft = corners;
    this.paint();
  }

  /** Show the slide as it is, in grey, or not at all. */
  setBackdrop(kind) {
    const { canvas } = this.viewer.drawer;
    canvas.style.filter = kind === "grey" ? "grayscale(1)" : "";
    canvas.style.visibility = kind === "hidden" ? "hidden" : "";
  }

  home(immediately = false) {
    if (!this.slide) return;
    if (!immediately) this.lead();
    this.setHome(true);
    stopKeys(this.viewer);
    const [width, height] = this.slide.size_um;
    this.show({ x: 0, y: 0, width, height }, immediately);
  }

  /**
   * Bring a rectangle in microns into sight.
   *
   * Not OpenSeadragon's fitBounds: it derives the place from the zoom of each frame, and leaves a movement that is under way
   * to go on, so that a view which was still sliding came to rest beside the slide (6.1).
   */
  show({ x, y, width, height }, immediately = false) {
    if (!this.host.clientWidth) return; // hidden: it takes its place from the other view once it is shown
    const { viewport } = this.viewer;
    const unit = this.slide.size_um[0];
    const room = this.host.clientHeight / this.host.clientWidth;
    const zoom = Math.min(unit / width, (room * unit) / height);
    viewport.zoomTo(zoom, null, immediately);
    viewport.panTo(new OpenSeadragon.Point((x + width / 2) / unit, (y + height / 2) / unit), immediately);
  }

  /** What is in sight, in microns: { x, y, width, height }. */
  inSight() {
    const box = this.viewer.viewport.getBounds(true);
    const unit = this.slide.size_um[0];
    return { x: box.x * unit, y: box.y * unit, width: box.width * unit, height: box.height * unit };
  }

  /** Show a rectangle in microns that somebody has chosen. */
  goTo(place) {
    this.lead();
    this.setHome(false);
    this.target = place;
    this.show(place, true);
  }

  /** Take the place of another view, whose size may be another. */
  take(other) {
    if (!other.slide) return;
    const { viewport } = this.viewer;
    viewport.panTo(other.viewer.viewport.getCenter(false), true);
    viewport.zoomTo(other.viewer.viewport.getZoom(false), null, true);
  }

  setHome(isHome) {
    for (const panel of [this, ...this.followers]) Object.assign(panel, { isHome, target: null });
  }

  /** Notes and legends come while a slide is read, and take room from the views: what was to be seen stays in sight. */
  resized() {
    const leading = this.following ? this.followers[0] : this;
    if (leading.isHome && leading.host.clientWidth) leading.home(true);
    else if (leading.target) leading.show(leading.target, true);
    this.paint();
  }

  /** From now on the other view follows this one: it was touched last. */
  lead() {
    this.following = false;
    for (const other of this.followers) other.following = true;
  }

  zoom(factor) {
    this.lead();
    this.setHome(false);
    this.viewer.viewport.zoomBy(factor);
    this.viewer.viewport.applyConstraints();
  }

  moved() {
    this.chooseTiles();
    if (this.following) return;
    const { viewport } = this.viewer;
    for (const other of this.followers) {
      if (!other.slide || !other.host.clientWidth) continue;
      // The same scale on the screen, whatever the widths of the two.
      const zoom = (viewport.getZoom(true) * this.host.clientWidth) / other.host.clientWidth;
      other.viewer.viewport.zoomTo(zoom, null, true);
      other.viewer.viewport.panTo(viewport.getCenter(true), true);
      other.chooseTiles();
    }
  }

  view() {
    const { viewport } = this.viewer;
    const origin = viewport.pixelFromPoint(new OpenSeadragon.Point(0, 0), true);
    const unit = viewport.pixelFromPoint(new OpenSeadragon.Point(1, 0), true);
    const [width, height] = [this.host.clientWidth, this.host.clientHeight];
    return { left: origin.x, top: origin.y, scale: (unit.x - origin.x) / this.slide.size_um[0], width, height };
  }

  centre() {
    const point = this.viewer.viewport.getCenter(true);
    return { x: point.x * this.slide.size_um[0], y: point.y * this.slide.size_um[0] };
  }

  pointed(event) {
    if (!this.slide) return;
    this.keyboard = false;
    this.look(this.placeOf(event));
  }

  /** Where a pointer is, in microns. */
  placeOf(event) {
    const box = this.host.getBoundingClientRect();
    const view = this.view();
    // The border of the view is no part of its canvas.
    return {
      x: (event.clientX - box.left - this.host.clientLeft - view.left) / view.scale,
      y: (event.clientY - box.top - this.host.clientTop - view.top) / view.scale,
    };
  }

  look(place) {
    this.onLook(this, place);
  }

  paint() {
    if (!this.slide) return;
    const view = this.view();
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(view.width * ratio), Math.round(view.height * ratio)];
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, view.width, view.height);
    this.canvas.style.opacity = 1;
    if (this.layer) {
      context.globalAlpha = this.opacity;
      this.layer.draw(context, view);
      context.globalAlpha = 1;
    }
    for (const region of this.regions) paintRegion(context, view, region);
    if (this.draft) paintRegion(context, view, { polygons: [[this.draft]], colour: "#14181d" });
    this.paintSpotlight(context, view);
    this.paintScaleBar(context, view);
  }

  paintSpotlight(context, view) {
    if (!this.spotlight) return;
    const [x, y, width, height] = this.spotlight.box ?? [this.spotlight.x, this.spotlight.y, 0, 0];
    const grown = Math.max(0, 7 - (width * view.scale) / 2);
    const box = [
      view.left + x * view.scale - grown,
      view.top + y * view.scale - grown,
      width * view.scale + 2 * grown,
      height * view.scale + 2 * grown,
    ];
    for (const [colour, line] of [["#ffffff", 4], ["#000000", 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = line;
      context.strokeRect(...box);
    }
  }

  paintScaleBar(context, view) {
    const bar = scaleBar(view.scale);
    if (!bar) return;
    const [left, bottom] = [12, view.height - 12];
    context.font = "600 12px system-ui, sans-serif";
    const width = Math.max(bar.long, context.measureText(bar.words).width) + 12;
    context.fillStyle = "rgb(255 255 255 / 85%)";
    context.fillRect(left - 6, bottom - 22, width, 28);
    context.fillStyle = "#111";
    context.fillText(bar.words, left, bottom - 8);
    context.fillRect(left, bottom - 3, bar.long, 3);
  }
}

/** A round length that fits on the screen, in words and in pixels; undefined where none does. */
export function scaleBar(scale) {
  const round = [10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000].filter((um) => um * scale <= 120).pop();
  return round && { long: round * scale, words: round >= 1000 ? `${round / 1000} mm` : `${round} µm` };
}

/** Draw a region's outline, dark on a light rim, so that it is seen on any colour; and its name. */
export function paintRegion(context, view, { polygons, colour, name }) {
  const path = regionPath(polygons, view);
  context.lineJoin = "round";
  for (const [ink, width] of [["#ffffff", 5], [colour, 2.5]]) {
    context.strokeStyle = ink;
    context.lineWidth = width;
    context.stroke(path);
  }
  if (!name) return;
  context.font = "600 12px system-ui, sans-serif";
  const [x, y] = namePlace(polygons, view, context.measureText(name).width);
  context.lineWidth = 3;
  context.strokeStyle = "#ffffff";
  context.strokeText(name, x, y);
  context.fillStyle = "#14181d";
  context.fillText(name, x, y);
}

/** Where a region's name stands, at its topmost corner: left end and base line in pixels of the view. */
export function namePlace(polygons, view, width) {
  const top = polygons[0][0].reduce((best, corner) => (corner[1] < best[1] ? corner : best));
  let [x, y] = [view.left + top[0] * view.scale, view.top + top[1] * view.scale - 7];
  // Near the view's edge the name moves in; a region that lies beyond it has none in sight.
  if (x > 0 && x < view.width) x = Math.max(4, Math.min(x, view.width - width - 4));
  if (y > -7 && y < view.height) y = Math.max(y, 14);
  return [x, y];
}

function regionPath(polygons, view) {
  const path = new Path2D();
  for (const ring of polygons.flat()) {
    ring.forEach(([x, y], i) => {
      const place = [view.left + x * view.scale, view.top + y * view.scale];
      if (i) path.lineTo(...place);
      else path.moveTo(...place);
    });
    path.closePath();
  }
  return path;
}

/** End what a key has begun: a press moves the view over ten frames, also when it is let go before (6.1). */
function stopKeys(viewer) {
  for (const held of [viewer._navActionVirtuallyHeld, viewer._activeActions]) {
    for (const action of Object.keys(held ?? {})) held[action] = false;
  }
}

function inLevel(picture, level, x, y) {
  if (level < picture.min_level || level > picture.max_level) return false;
  const side = picture.tile_px * 2 ** (picture.max_level - level);
  return x >= 0 && y >= 0 && x * side < picture.width && y * side < picture.height;
}

/** Let two views move together. */
export function link(one, other) {
  one.followers = [other];
  other.followers = [one];
  one.lead();
}
