// What has come of a run: charts, what leads, latencies, a table, and CSV.

import { LineChart } from "./chart.js";
import { exact, format, sizeOf } from "./codec.js";
import { writeCsv } from "./columns.js";
import { $, h, say } from "./dom.js";
import { Legend } from "./legend.js";

const LINES = 12; // of a chart that has no labels, and names of a legend, at most
const TABLE_ROWS = 500;
const TELL_MS = 2500; // between two sentences to a screen reader
const RECENT = 200; // steps that the latency is the median of

export class Results {
  constructor() {
    this.chart = new LineChart($("output-chart"), "Outputs over steps");
    this.legend = new Legend($("output-legend"), this.chart);
    $("download").addEventListener("click", () => this.download());
    $("values").addEventListener("toggle", () => this.fillTable());
    this.clear();
  }

  clear() {
    this.begin(null, 0);
  }

  /** Begin a run of so many steps. */
  begin(whole, steps) {
    this.whole = whole;
    this.steps = steps;
    this.rows = [];
    this.num = 0;
    this.latencies = [];
    this.told = 0;
    this.beganAt = null;
    this.fail("");
    $("made").hidden = true;
    $("output-figure").hidden = false;
    say($("live"), "");
    $("leading").replaceChildren("\u00a0");
    say($("fact-steps"), steps ? `0 of ${steps}` : "0");
    say($("fact-rate"), "–");
    say($("fact-latency"), "–");
    say($("latency-name"), "Latency");
    const outputs = whole ? whole.spec.graphs[0].outputs : [];
    this.output = outputs.find(({ layout }) => layout === "per_step") || outputs[0] || null;
    this.elements = this.output ? namesOf(this.output, whole.spec) : [];
    this.isClasses = this.elements.length > 0 && whole.spec.labels.length === this.elements.length;
    const shown = this.isClasses ? this.elements : this.elements.slice(0, LINES);
    this.chart.reset(
      shown.map((name, index) => ({ name, color: index % 12 })),
      { steps, range: this.isClasses ? { low: 0, high: 1 } : null, unit: this.output?.unit || "" },
    );
    const rest = this.elements.length - Math.min(shown.length, LINES);
    this.legend.show(LINES, rest > 0 ? `and ${rest} more, which the CSV has` : "");
    this.names = outputs.flatMap((output) => namesOf(output, whole.spec));
    this.widths = outputs.map((output) => ({ name: output.name, width: sizeOf(output.row_shape) }));
    this.table = () => ({
      head: ["step", ...this.names, "latency_ms"],
      rows: this.rows.map(({ step, all, latency }) => [step, ...all.map(exact), latency.toFixed(3)]),
    });
    this.fillTable();
    $("download").disabled = true;
  }

  /** Take the outputs of steps from a position on: rows by name, milliseconds of each step. */
  take(position, outputs, latencies) {
    const now = performance.now();
    if (this.beganAt === null) this.beganAt = now - latencies[0];
    const isPerStep = this.output.layout === "per_step";
    outputs[this.output.name].forEach((row, index) => {
      const latency = isPerStep ? latencies[index] : latencies.at(-1);
      const step = isPerStep ? position + index : position + latencies.length - 1;
      const all = this.widths.flatMap(({ name, width }) => outputs[name][index] ?? Array(width).fill(NaN));
      this.rows.push({ step, row, all, latency });
      this.latencies.push(latency);
      this.chart.push(row, step);
    });
    this.num = position + latencies.length;
    this.refresh();
  }

  /** Show the newest numbers once a frame. */
  refresh() {
    if (this.isDirty) return;
    this.isDirty = true;
    requestAnimationFrame(() => {
      this.isDirty = false;
      this.show();
    });
  }

  show() {
    if (!this.rows.length) return;
    $("download").disabled = false;
    const { row } = this.rows.at(-1);
    this.legend.values.forEach((_, at) => this.legend.set(at, this.isClasses ? percent(row[at]) : format(row[at])));
    const text = this.sentence(row);
    $("leading").replaceChildren(text.main, h("small", {}, `  ${text.more}`));
    const seconds = (performance.now() - this.beganAt) / 1000;
    say($("fact-steps"), `${this.num} of ${this.steps}`);
    if (this.num > 1 && seconds > 0) say($("fact-rate"), format(Math.round(this.num / seconds)));
    const isWhole = this.whole.step_mode === "buffered"; // its first steps wait for the last
    const recent = this.latencies.slice(-RECENT).sort((one, other) => one - other);
    const latency = isWhole ? this.latencies.at(-1) : recent[recent.length >> 1];
    say($("fact-latency"), `${format(Number(latency.toPrecision(3)))} ms`);
    if ($("values").open) this.fillTable();
    this.tell(`${text.main} ${text.more}, step ${this.num} of ${this.steps}`);
  }

  /** What a row says. */
  sentence(row) {
    if (this.isClasses) {
      const best = row.indexOf(Math.max(...row));
      this.chart.lead(best);
      this.legend.lead(best);
      return { main: this.elements[best] ?? "not a number", more: percent(row[best]) };
    }
    const unit = this.output.unit ? ` ${this.output.unit}` : "";
    if (this.elements.length === 1) return { main: `${format(row[0])}${unit}`, more: this.elements[0] };
    return { main: `${this.elements[0]} ${format(row[0])}${unit}`, more: `and ${this.elements.length - 1} more` };
  }

  tell(text, isLast = false) {
    const now = performance.now();
    if (!isLast && now - this.told < TELL_MS) return;
    this.told = now;
    say($("live"), text);
  }

  /** The run is over; text says why, where it was not the end. */
  finish(text) {
    this.show();
    this.fillTable();
    if (text) this.fail(text);
    else if (this.num) this.tell(`Done after ${this.num} steps: ${$("leading").textContent}`, true);
  }

  fail(text) {
    say($("try-error"), text);
  }

  fillTable() {
    if (!$("values").open) {
      $("value-table").replaceChildren();
      return;
    }
    const { head, rows } = this.table();
    const pick = (row) => (row.length > LINES + 2 ? [...row.slice(0, LINES + 1), row.at(-1)] : row);
    const cells = (tag, row, attributes = {}) => h("tr", {}, ...pick(row).map((each) => h(tag, attributes, String(each))));
    $("value-table").replaceChildren(
      h("thead", {}, cells("th", head, { scope: "col" })),
      h("tbody", {}, ...rows.slice(-TABLE_ROWS).map((row) => cells("td", row))),
    );
  }

  /** Let the browser keep the table as a file, with every output of every step. */
  download() {
    const { head, rows } = this.table();
    const url = URL.createObjectURL(new Blob([writeCsv(head, rows)], { type: "text/csv" }));
    h("a", { href: url, download: `${this.whole.name}-${this.whole.version}.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }
}

function percent(share) {
  return `${(100 * share).toFixed(1)}%`;
}

function namesOf(output, spec) {
  const width = sizeOf(output.row_shape);
  if (spec.labels.length === width) return spec.labels;
  if (output.element_names.length === width) return output.element_names;
  return Array.from({ length: width }, (_, at) => (width === 1 ? output.name : `${output.name}[${at}]`));
}
