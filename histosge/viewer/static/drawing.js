// Drawing a region on a view: a lasso or a rectangle, by pointer or finger. Escape gives it up.

import { simplified } from "./geometry.js";

const STEP_PX = 2; // a pointer that moved less adds no corner
const SMALL_PX = 6; // a region smaller than this is a click

export class Drawing {
  /**
   * @param panels the views
   * @param onDone called with the corners in microns, or null when it was given up
   */
  constructor(panels, onDone) {
    this.panels = panels;
    this.onDone = onDone;
    this.kind = null;
    for (const panel of panels) {
      const on = (name, act) => panel.host.addEventListener(name, (event) => this.kind && act(panel, event), { capture: true });
      on("pointerdown", (...found) => this.begin(...found));
      on("pointermove", (...found) => this.extend(...found));
      on("pointerup", (...found) => this.finish(...found));
      on("pointercancel", () => this.stop(null));
    }
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.kind && this.stop(null));
  }

  /** From now on the pointer draws: "lasso" or "rectangle". */
  start(kind) {
    this.kind = kind;
    this.corners = null;
    for (const panel of this.panels) {
      panel.viewer.setMouseNavEnabled(false);
      panel.host.classList.add("drawing");
    }
  }

  begin(panel, event) {
    if (event.button !== 0) return;
    event.preventDefault();
    panel.host.setPointerCapture(event.pointerId);
    this.panel = panel;
    this.last = [event.clientX, event.clientY];
    this.extent = 0;
    const { x, y } = panel.placeOf(event);
    this.corners = [[x, y]];
  }

  extend(panel, event) {
    if (!this.corners || panel !== this.panel) return;
    const { x, y } = panel.placeOf(event);
    const step = Math.hypot(event.clientX - this.last[0], event.clientY - this.last[1]);
    if (this.kind === "rectangle") {
      const [ax, ay] = this.corners[0];
      this.corners = [[ax, ay], [x, ay], [x, y], [ax, y]];
      this.extent = Math.max(this.extent, step);
    } else if (step >= STEP_PX) {
      this.corners.push([x, y]);
      this.last = [event.clientX, event.clientY];
      this.extent += step;
    }
    for (const each of this.panels) each.setDraft(this.corners);
  }

  finish(panel) {
    if (!this.corners || panel !== this.panel) return;
    const corners = this.kind === "lasso" ? simplified(this.corners, 1 / panel.view().scale) : this.corners;
    this.stop(this.extent >= SMALL_PX && corners.length > 2 ? corners : null);
  }

  stop(corners) {
    this.kind = this.corners = null;
    for (const panel of this.panels) {
      panel.setDraft(null);
      panel.viewer.setMouseNavEnabled(true);
      panel.host.classList.remove("drawing");
    }
    this.onDone(corners);
  }
}
