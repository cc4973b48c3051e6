// What has come of a run: charts, what leads, latencies, a table, and CSV.

import { LineChart } from "./chart.js";
import { exact, format, sizeOf } from "./codec.js";
import { writeCsv } from "./columns.js";
import { $, h, say } from "./dom.js";

const LINES = 12;
/** Most lines of a chart that have no labels, and most names of a legend. */
const TABLE_ROWS = 500;
const TELL_MS = 2500;
/** Time between two sentences to a screen reader. */

export class Results {
  constructor() {
    this.chart = new LineChart($("output-chart"), "Outputs over steps");
    $("download").addEventListener("click", () => this.download());
    $("values").addEventListener("toggle", () => this.fillTable());
    this.clear();
  }

  clear() {
    this.begin(null, 0);
  }

  /** Begin a run of a model that is stepped, of so many steps. */
  begin(whole, steps) {
    this.whole = whole;
    this.rows = [];
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
    this.steps = steps;
    this.output = whole ? whole.spec.graphs[0].outputs[0] : null;
    this.elements = this.output ? namesOf(this.output, whole.spec) : [];
    this.isClasses = Boolean(whole && whole.spec.labels.length === this.elements.length && this.elements.length);
    const shown = this.isClasses ? this.elements : this.elements.slice(0, LINES);
    this.series = shown.map((name, index) => ({ name, color: index % 12 }));
    this.chart.reset(this.series, {
      steps,
      range: this.isClasses ? { low: 0, high: 1 } : null,
      unit: this.output?.unit || "",
    });
    this.values = this.series.slice(0, LINES).map(() => h("i", {}, ""));
    const rest = this.elements.length - this.values.length;
    $("output-legend").replaceChildren(
      ...this.values.map((value, at) => h("li", { class: `key c${this.series[at].color}` }, h("span", {}, this.series[at].name, " "), value)),
      ...(rest > 0 ? [h("li", {}, `and ${rest} more, which the CSV has`)] : []),
    );
    this.fillTable();
    this.refresh();
  }

  /** Take the outputs of steps from a position on. */
  take(position, outputs, latencies) {
    const now = performance.now();
    if (this.beganAt === null) this.beganAt = now - (latencies[0] || 0);
    const rows = outputs[this.output.name];
    rows.forEach((row, index) => {
      const latency = latencies[index] ?? latencies.at(-1) ?? 0;
      const step = rows.length === latencies.length ? position + index : position + latencies.length - 1;
      const all = this.whole.spec.graphs[0].outputs.flatMap(({ name }) => outputs[name][index] ?? []);
      this.rows.push({ step, row, all, latency });
      this.latencies.push(latency);
      this.chart.push(row);
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
    $("download").disabled = !this.rows.length;
    if (!this.rows.length) return;
    const { row } = this.rows.at(-1);
    this.values.forEach((element, at) => say(element, format(Number(row[at].toPrecision(3)))));
    const text = this.sentence(row);
    $("leading").replaceChildren(text.main, h("small", {}, `  ${text.more}`));
    const seconds = (performance.now() - this.beganAt) / 1000;
    say($("fact-steps"), `${this.num} of ${this.steps}`);
    if (this.num > 1 && seconds > 0) say($("fact-rate"), format(Math.round(this.num / seconds)));
    const recent = this.latencies.slice(-200).sort((one, other) => one - other);
    say($("fact-latency"), `${format(Number(recent[recent.length >> 1].toPrecision(3)))} ms`);
    if ($("values").open) this.fillTable();
    this.tell(`${text.main} ${text.more}, step ${this.num} of ${this.steps}`);
  }

  /** What a row says. */
  sentence(row) {
    if (this.isClasses) {
      let best = 0;
      row.forEach((each, at) => {
        if (each > row[best]) best = at;
      });
      this.chart.lead(best);
      [...$("output-legend").children].forEach((each, at) => each.classList.toggle("leads", at === best));
      return { main: this.elements[best], more: `${(100 * row[best]).toFixed(1)}%` };
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

  /** The run is over: text says why, where it was not the end. */
  finish(text) {
    this.show();
    this.fillTable();
    if (text) this.fail(text);
    else if (this.rows.length) this.tell(`Done after ${this.num} steps: ${$("leading").textContent}`, true);
  }

  fail(text) {
    say($("try-error"), text);
  }

  fillTable() {
    const names = this.elements.slice(0, LINES);
    const head = h("tr", {}, ...["Step", ...names, "Latency, ms"].map((each) => h("th", { scope: "col" }, each)));
    if (!$("values").open) {
      $("value-table").replaceChildren();
      return;
    }
    const rows = this.rows
      .slice(-TABLE_ROWS)
      .map(({ step, row, latency }) =>
        h("tr", {}, ...[step, ...row.slice(0, LINES).map(exact), latency.toFixed(2)].map((each) => h("td", {}, String(each)))),
      );
    $("value-table").replaceChildren(h("thead", {}, head), h("tbody", {}, ...rows));
  }

  /** Every output of every step as a file. */
  download() {
    const names = this.whole.spec.graphs[0].outputs.flatMap((output) => namesOf(output, this.whole.spec));
    const rows = this.rows.map(({ step, all, latency }) => [step, ...all.map(exact), latency.toFixed(3)]);
    save(`${this.whole.name}-${this.whole.version}.csv`, writeCsv(["step", ...names, "latency_ms"], rows));
  }
}

/** Let the browser keep a text as a file. */
export function save(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function namesOf(output, spec) {
  const width = sizeOf(output.row_shape);
  if (spec.labels.length === width) return spec.labels;
  if (output.element_names.length === width) return output.element_names;
  return Array.from({ length: width }, (_, at) => (width === 1 ? output.name : `${output.name}[${at}]`));
}
