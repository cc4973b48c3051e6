// Lines over steps, as SVG: sparklines of the overview, and charts of the try-it panel.

import { format } from "./codec.js";

const NS = "http://www.w3.org/2000/svg";

/** Make an SVG element. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Round numbers, about `most` of them, that cover a range. */
export function ticks(low, high, most) {
  const span = high - low || Math.abs(high) || 1;
  const rough = span / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough * 0.7);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at += 1) found.push(at * step);
  return found;
}

/** Path of a line through columns of values; of more than two points a pixel, each pixel's lowest and highest. */
function path(values, x, y, width) {
  const perPixel = values.length / Math.max(1, width);
  let text = "";
  let pen = "M";
  const put = (index) => {
    if (!Number.isFinite(values[index])) {
      pen = "M";
      return;
    }
    text += `${pen}${x(index).toFixed(2)} ${y(values[index]).toFixed(2)}`;
    pen = "L";
  };
  if (perPixel <= 2) {
    for (let index = 0; index < values.length; index += 1) put(index);
    return text;
  }
  const size = Math.ceil(perPixel);
  for (let start = 0; start < values.length; start += size) {
    let low = start;
    let high = start;
    for (let index = start; index < Math.min(start + size, values.length); index += 1) {
      if (values[index] < values[low]) low = index;
      if (values[index] > values[high]) high = index;
    }
    put(Math.min(low, high));
    if (low !== high) put(Math.max(low, high));
  }
  return text;
}

/** A line without axes, of the newest `length` values. */
export class Sparkline {
  constructor(host, length) {
    this.length = length;
    this.values = [];
    this.area = svg("path", { class: "area" });
    this.line = svg("path", { class: "line" });
    host.append(svg("svg", { viewBox: "0 0 100 30", preserveAspectRatio: "none", "aria-hidden": "true" }, this.area, this.line));
  }

  push(value) {
    this.values.push(value);
    if (this.values.length > this.length) this.values.shift();
    const top = Math.max(...this.values, 1e-9) * 1.1;
    const first = this.length - this.values.length;
    const x = (index) => ((first + index) / (this.length - 1)) * 100;
    const line = path(this.values, x, (each) => 29 - (each / top) * 27, 100);
    this.line.setAttribute("d", line);
    this.area.setAttribute("d", line && `${line}L100 30L${x(0).toFixed(2)} 30Z`);
  }
}

const MARGIN = { top: 10, right: 14, bottom: 24, left: 46 };

/** Lines over steps with axes, and a cursor that reads values out. */
export class LineChart {
  /** host: an element; its aria-label becomes `label`. */
  constructor(host, label) {
    this.host = host;
    this.label = label;
    this.root = svg("svg", { role: "img", "aria-label": label });
    this.tip = document.createElement("div");
    this.tip.className = "tip";
    this.tip.hidden = true;
    host.append(this.root, this.tip);
    this.reset([], {});
    new ResizeObserver(() => this.redraw()).observe(host);
    host.addEventListener("pointermove", (event) => this.point(event));
    host.addEventListener("pointerleave", () => this.unpoint());
  }

  /** Begin anew: series [{name, color}], range {low, high} or none, steps expected, unit. */
  reset(series, { range = null, steps = 0, unit = "" } = {}) {
    this.series = series.map((each) => ({ ...each, values: [] }));
    this.at = [];
    this.range = range;
    this.steps = steps;
    this.unit = unit;
    this.leader = -1;
    this.unpoint();
    this.redraw();
  }

  /** Put a row behind: a value for each series, at a step. */
  push(row, step) {
    this.at.push(step);
    this.series.forEach((each, index) => each.values.push(row[index]));
    this.redraw();
  }

  /** Show or hide a line. */
  toggle(index) {
    this.series[index].isHidden = !this.series[index].isHidden;
    this.redraw();
  }

  /** Draw one series before the others. */
  lead(index) {
    if (index === this.leader) return;
    this.leader = index;
    this.redraw();
  }

  get count() {
    return this.at.length;
  }

  redraw() {
    if (this.isDirty) return;
    this.isDirty = true;
    requestAnimationFrame(() => {
      this.isDirty = false;
      this.draw();
    });
  }

  bounds() {
    if (this.range) return [this.range.low, this.range.high];
    let low = Infinity;
    let high = -Infinity;
    for (const { values, isHidden } of this.series) {
      if (isHidden) continue;
      for (const value of values) {
        if (value < low && value > -Infinity) low = value;
        if (value > high && value < Infinity) high = value;
      }
    }
    if (low > high) return [0, 1];
    const room = (high - low || Math.abs(high) || 1) * 0.08;
    return [low - room, high + room];
  }

  draw() {
    const width = this.host.clientWidth;
    const height = this.host.clientHeight;
    if (!width || !height) return;
    const [low, high] = this.bounds();
    const last = Math.max(this.steps - 1, this.at.at(-1) ?? 0, 1);
    const inner = width - MARGIN.left - MARGIN.right;
    const x = (index) => MARGIN.left + (index / last) * inner;
    const y = (value) => height - MARGIN.bottom - ((value - low) / (high - low)) * (height - MARGIN.top - MARGIN.bottom);
    this.scale = { x, y, last, inner, low, high, height };
    this.root.setAttribute("viewBox", `0 0 ${width} ${height}`);
    Object.assign(this.root.dataset, { low, high, last });
    const grid = svg("g", { class: "grid" });
    for (const value of ticks(low, high, Math.max(2, Math.floor(height / 38)))) {
      grid.append(svg("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }));
      const text = svg("text", { x: MARGIN.left - 8, y: y(value) + 3.5, "text-anchor": "end" }, format(value));
      grid.append(text);
    }
    for (const step of ticks(0, last, Math.max(2, Math.floor(inner / 80))).filter(Number.isInteger)) {
      grid.append(svg("text", { x: x(step), y: height - 6, "text-anchor": "middle" }, String(step)));
    }
    const order = this.series.map((_, index) => index).filter((index) => !this.series[index].isHidden);
    order.sort((one, other) => (one === this.leader) - (other === this.leader));
    const across = (index) => x(this.at[index]);
    const lines = order.map((index) => {
      const { name, color, values } = this.series[index];
      const role = this.leader < 0 ? "" : index === this.leader ? " leads" : " follows";
      const d = path(values, across, y, inner);
      return svg("path", { class: `line c${color}${role}`, d, "data-name": name });
    });
    const dots = order
      .filter((index) => this.series[index].values.length)
      .filter((index) => (this.leader < 0 ? order.length <= 3 : index === this.leader))
      .map((index) => {
        const { color, values } = this.series[index];
        const at = values.length - 1;
        return svg("circle", { class: `dot c${color}`, cx: across(at), cy: y(values[at]) || 0, r: 3.5 });
      });
    this.cursor = svg("line", { class: "cursor", y1: MARGIN.top, y2: height - MARGIN.bottom, x1: -9, x2: -9 });
    this.root.replaceChildren(grid, this.cursor, ...lines, ...dots);
    this.root.setAttribute("aria-label", `${this.label}: ${this.count} steps, ${this.series.length} lines`);
  }

  point(event) {
    if (!this.count || !this.scale) return;
    const { x, last, inner } = this.scale;
    const left = event.clientX - this.host.getBoundingClientRect().left;
    const step = Math.round(((left - MARGIN.left) / inner) * last);
    const index = this.at.indexOf(step);
    if (index < 0) {
      this.unpoint();
      return;
    }
    this.cursor.setAttribute("x1", x(step));
    this.cursor.setAttribute("x2", x(step));
    const best = this.series
      .filter((each) => !each.isHidden)
      .map((each) => ({ ...each, value: each.values[index] }))
      .sort((one, other) => other.value - one.value)
      .slice(0, 5);
    const title = document.createElement("b");
    title.textContent = `Step ${step}`;
    this.tip.replaceChildren(
      title,
      ...best.map(({ name, color, value }) => {
        const line = document.createElement("span");
        line.className = `key c${color}`;
        line.textContent = `${name}  ${format(value)}${this.unit ? ` ${this.unit}` : ""}`;
        return line;
      }),
    );
    this.tip.hidden = false;
    const isRight = left > this.host.clientWidth / 2;
    this.tip.style.left = isRight ? "" : `${x(step) + 12}px`;
    this.tip.style.right = isRight ? `${this.host.clientWidth - x(step) + 12}px` : "";
  }

  unpoint() {
    this.tip.hidden = true;
    this.cursor?.setAttribute("x1", -9);
    this.cursor?.setAttribute("x2", -9);
  }
}
