// A curve that is drawn: by dragging, or by keys.

import { svg } from "./chart.js";
import { format } from "./codec.js";
import { $, say } from "./dom.js";

const WIDTH = 1000;
const HEIGHT = 300;
const SHAPES = {
  sine: (at) => 0.5 + 0.42 * Math.sin(at * Math.PI * 4),
  step: (at) => (at < 0.5 ? 0.15 : 0.85),
  ramp: (at) => 0.05 + 0.9 * at,
  flat: () => 0.5,
};

export class Curve {
  constructor() {
    this.host = $("draw");
    this.line = svg("path", { class: "line" });
    this.area = svg("path", { class: "area" });
    this.cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT });
    this.host.append(
      svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" }, this.area, this.line, this.cursor),
    );
    this.heights = [];
    this.at = 0;
    this.last = null;
    this.host.addEventListener("pointerdown", (event) => this.begin(event));
    this.host.addEventListener("pointermove", (event) => this.drag(event));
    this.host.addEventListener("pointerup", () => this.finish());
    this.host.addEventListener("pointercancel", () => this.finish());
    this.host.addEventListener("keydown", (event) => this.key(event));
    this.host.addEventListener("focus", () => this.tell());
    for (const name of ["draw-low", "draw-high"]) $(name).addEventListener("change", () => this.tell());
    $("draw-steps").addEventListener("change", () => this.resize(this.steps));
    for (const button of document.querySelectorAll("[data-shape]")) {
      button.addEventListener("click", () => this.shape(button.dataset.shape));
    }
    this.shape("sine");
  }

  get steps() {
    return Math.min(2000, Math.max(2, Math.round(Number($("draw-steps").value)) || 60));
  }

  get range() {
    return [Number($("draw-low").value), Number($("draw-high").value)];
  }

  /** The curve in units of the input. */
  get values() {
    const [low, high] = this.range;
    return this.heights.map((each) => low + each * (high - low));
  }

  setRange(low, high) {
    $("draw-low").value = format(low);
    $("draw-high").value = format(high);
    this.draw();
  }

  shape(name) {
    const steps = this.steps;
    this.heights = Array.from({ length: steps }, (_, index) => SHAPES[name](index / (steps - 1)));
    this.draw();
  }

  resize(steps) {
    const before = this.heights;
    this.heights = Array.from({ length: steps }, (_, index) => before[Math.round((index / (steps - 1)) * (before.length - 1))]);
    this.at = Math.min(this.at, steps - 1);
    this.draw();
  }

  draw() {
    const x = (index) => (index / (this.heights.length - 1)) * WIDTH;
    const points = this.heights.map((each, index) => `${x(index).toFixed(1)} ${((1 - each) * HEIGHT).toFixed(1)}`);
    const line = `M${points.join("L")}`;
    this.line.setAttribute("d", line);
    this.area.setAttribute("d", `${line}L${WIDTH} ${HEIGHT}L0 ${HEIGHT}Z`);
    this.cursor.setAttribute("x1", x(this.at));
    this.cursor.setAttribute("x2", x(this.at));
  }

  place(event) {
    const box = this.host.getBoundingClientRect();
    const across = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const height = Math.min(1, Math.max(0, 1 - (event.clientY - box.top) / box.height));
    return { step: Math.round(across * (this.heights.length - 1)), height };
  }

  begin(event) {
    if (event.button !== 0) return;
    this.host.setPointerCapture(event.pointerId);
    this.last = this.place(event);
    this.drag(event);
  }

  /** Set every step between the last place of the pointer and this one. */
  drag(event) {
    if (this.last === null) return;
    const to = this.place(event);
    const from = this.last;
    const count = Math.abs(to.step - from.step);
    for (let index = 0; index <= count; index += 1) {
      const part = count ? index / count : 1;
      this.heights[from.step + Math.sign(to.step - from.step) * index] = from.height + part * (to.height - from.height);
    }
    this.at = to.step;
    this.last = to;
    this.draw();
  }

  finish() {
    this.last = null;
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const far = event.shiftKey ? 10 : 1;
    const last = this.heights.length - 1;
    const moves = { ArrowLeft: this.at - far, ArrowRight: this.at + far, Home: 0, End: last };
    const lifts = { ArrowUp: 0.01 * far, ArrowDown: -0.01 * far, PageUp: 0.2, PageDown: -0.2 };
    if (event.key in moves) this.at = Math.min(last, Math.max(0, moves[event.key]));
    else if (event.key in lifts) this.heights[this.at] = Math.min(1, Math.max(0, this.heights[this.at] + lifts[event.key]));
    else return;
    event.preventDefault();
    this.draw();
    this.tell();
  }

  tell() {
    say($("draw-value"), `Step ${this.at + 1} of ${this.heights.length}: ${format(this.values[this.at])}`);
  }
}
