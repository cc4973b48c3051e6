// The try-it panel: a model, an input, a session, and its outputs as they arrive.

import { get } from "./api.js";
import { LineChart } from "./chart.js";
import { count, exact, format } from "./codec.js";
import { InputError, columnsOf, isId, isText, readCsv, readText, rowsOf, writeCsv } from "./columns.js";
import { ContextFields } from "./contexts.js";
import { $, fill, h, say } from "./dom.js";
import { Curve } from "./draw.js";
import { GenerateForm } from "./generate.js";
import { Legend } from "./legend.js";
import { Results } from "./results.js";
import { chunkOf, readSignal, stretch } from "./signal.js";
import { Stepping } from "./stepping.js";

const MODES = {
  stepping: "Answers after every step.",
  chunked: "Answers after every chunk.",
  buffered: "Needs the whole sequence: it answers once the last step has come.",
  generative: "Makes its outputs one after another.",
};
const RATES = 60;
const LARGEST_FILE = 16 << 20;
const LONGEST_SHOWN = 1 << 18;

export class TryIt {
  constructor() {
    this.models = [];
    this.model = null;
    this.run = null;
    this.curve = new Curve();
    this.results = new Results();
    this.generate = new GenerateForm(this.results);
    this.input = new LineChart($("input-chart"), "Inputs over steps");
    this.inputLegend = new Legend($("input-legend"), this.input);
    $("try-model").addEventListener("change", () => this.load());
    $("example").addEventListener("change", () => this.showExample());
    $("draw-feature").addEventListener("change", () => this.fitRange());
    $("csv-fill").addEventListener("click", () => this.fillCsv());
    $("csv-file").addEventListener("change", (event) => this.readFile(event.target));
    $("rate").addEventListener("input", () => this.showRate());
    $("sources").addEventListener("change", () => this.showSource());
    $("try-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    $("csv").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.start();
    });
    $("pause").addEventListener("click", () => this.pause());
    $("stop").addEventListener("click", () => this.run?.stop());
    this.showRate();
    this.showButtons();
  }

  get rate() {
    const at = Number($("rate").value);
    return at > RATES ? Infinity : 10 ** ((at / RATES) * 3);
  }

  get source() {
    return document.querySelector('[name="source"]:checked').value;
  }

  /** Offer what is served; keeps what was chosen. */
  async show(models) {
    this.models = models;
    fill(
      $("try-model"),
      models.map(({ name, version }) => ({ value: `${name}/${version}`, text: `${name}, version ${version}` })),
    );
    if (!this.model) {
      const first = models.find(({ step_mode }) => step_mode === "stepping") || models[0];
      if (first) $("try-model").value = `${first.name}/${first.version}`;
    }
    const key = $("try-model").value;
    if (!this.model || `${this.model.name}/${this.model.version}` !== key) await this.load();
  }

  choose(model) {
    $("try-model").value = `${model.name}/${model.version}`;
    this.load();
    $("try").scrollIntoView();
    $("try-model").focus({ preventScroll: true });
  }

  async load() {
    this.run?.stop();
    const key = $("try-model").value;
    this.model = this.models.find(({ name, version }) => `${name}/${version}` === key) || null;
    this.whole = null;
    this.showButtons();
    this.results.clear();
    if (!this.model) {
      say($("try-mode"), "No model is served.");
      return;
    }
    say($("try-mode"), MODES[this.model.step_mode]);
    try {
      const whole = await get(`api/models/${encodeURIComponent(this.model.name)}/versions/${this.model.version}`);
      if (key === $("try-model").value) this.prepare(whole);
    } catch (error) {
      this.results.fail(error.message);
    }
  }

  prepare(whole) {
    this.whole = whole;
    const isGenerating = whole.spec.generation !== null;
    $("step-controls").hidden = isGenerating;
    $("generate-controls").hidden = !isGenerating;
    $("input-figure").hidden = isGenerating;
    if (isGenerating) this.generate.prepare(whole);
    else this.prepareSteps(whole);
    this.showButtons();
  }

  prepareSteps({ spec, examples }) {
    const [graph] = spec.graphs;
    this.inputs = graph.inputs.filter(({ layout }) => layout === "per_step");
    this.columns = columnsOf(this.inputs);
    this.chunk = chunkOf(this.model, this.inputs, this.columns);
    this.given = new ContextFields(graph.inputs.filter(({ layout }) => layout === "per_sequence"), "given");
    $("given").replaceChildren(...this.given.parts);
    $("given").hidden = !this.given.parts.length;
    this.examples = examples.map((example) => ({ ...example, rows: rowsOf(example, this.inputs) }));
    fill($("example"), this.examples.map(({ name }, index) => ({ value: String(index), text: name })));
    $("example").value = "0";
    this.offer("example", this.examples.length > 0);
    $("csv-fill").hidden = !this.examples.length;
    this.offer("text", isText(this.columns));
    const drawable = this.columns.map((column, index) => ({ column, index })).filter(({ column }) => !isId(column));
    this.offer("draw", drawable.length > 0);
    const signal = [{ value: "0", text: this.inputs[0].name }];
    fill($("draw-feature"), this.chunk ? signal : drawable.map(({ column, index }) => ({ value: String(index), text: named(column) })));
    $("draw-others-field").hidden = this.columns.length < 2 || this.chunk > 0;
    say($("csv-note"), `${this.takes()} A header is optional. Ctrl+Enter starts.`);
    this.setCsv("");
    $("text").value = "";
    this.fitRange();
    this.showSource();
  }

  /** What the columns of a CSV are. */
  takes() {
    const names = this.columns.map(({ name }) => name);
    if (this.chunk) return `One column of samples, ${this.chunk} a step; or the ${this.chunk} of a step in a row.`;
    const shown = names.length > 8 ? `${names.slice(0, 6).join(", ")}, … ${names.at(-1)}` : names.join(", ");
    return `${names.length} ${names.length === 1 ? "column" : "columns"}: ${shown}.`;
  }

  offer(source, isThere) {
    const radio = document.querySelector(`[name="source"][value="${source}"]`);
    radio.closest("label").hidden = !isThere;
    if (!isThere && radio.checked) document.querySelector('[name="source"][value="csv"]').checked = true;
    else if (isThere && source === "example") radio.checked = true;
  }

  showSource() {
    for (const each of document.querySelectorAll(".source")) each.hidden = each.dataset.source !== this.source;
    this.showExample();
  }

  showExample() {
    const example = this.example;
    if (!example) return;
    this.given.take(example);
    say($("example-note"), `${example.rows.length} steps. ${example.source}${example.license ? `, ${example.license}` : ""}.`);
    if (this.source === "example" && !this.run) this.preview(example.rows);
  }

  get csv() {
    return $("csv").value || this.file || "";
  }

  get example() {
    return this.examples[Number($("example").value)] || this.examples[0];
  }

  /** Show an input before it is sent. */
  preview(rows) {
    this.results.begin(this.whole, rows.length);
    this.showInput(rows);
  }

  showInput(rows) {
    const isIds = this.columns.every(isId);
    $("input-chart").hidden = isIds;
    $("input-legend").hidden = isIds;
    $("input-tokens").hidden = !isIds;
    if (isIds) {
      const word = (id, { categories }) => categories[id] || String(id);
      $("input-tokens").replaceChildren(
        ...rows.slice(0, 400).map((row) => h("span", {}, row.map((id, at) => word(id, this.columns[at])).join(" "))),
      );
      return;
    }
    if (this.chunk) {
      this.input.reset([{ name: this.inputs[0].name, color: 0 }], { steps: rows.length, unit: this.inputs[0].unit });
      rows.forEach((row, step) => row.forEach((sample, at) => this.input.push([sample], step + at / this.chunk)));
      this.inputLegend.show(1);
      return;
    }
    const shown = this.columns.map((column, index) => ({ column, index })).filter(({ column }) => !isId(column)).slice(0, 12);
    const series = shown.map(({ column, index }) => ({ name: named(column), color: index % 12 }));
    this.input.reset(series, { steps: rows.length });
    rows.forEach((row, step) => this.input.push(shown.map(({ index }) => row[index]), step));
    // Lines of other sizes would flatten the one that counts.
    const first = this.source === "draw" ? shown.findIndex(({ index }) => index === Number($("draw-feature").value)) : 0;
    const spans = this.input.series.map(({ values }) => spanOf(values));
    spans.forEach(([low, high], index) => {
      const [bottom, top] = spans[Math.max(0, first)];
      const isFar = Math.max(high, top) - Math.min(low, bottom) > 8 * Math.max(top - bottom, 1e-9);
      if (isFar || (this.source === "draw" && index !== first)) this.input.toggle(index);
    });
    const rest = this.columns.length - shown.length;
    this.inputLegend.show(12, rest > 0 ? `and ${rest} more` : "");
  }

  fitRange() {
    const at = Number($("draw-feature").value);
    const values = this.examples.flatMap(({ rows }) => rows.map((row) => row[at])).filter(Number.isFinite);
    if (!values.length) {
      this.curve.setRange(-1, 1);
      return;
    }
    const low = Math.min(...values);
    const high = Math.max(...values);
    const room = (high - low || 1) * 0.1;
    this.curve.setRange(low - room, high + room);
  }

  fillCsv() {
    if (!this.example) return;
    const cell = (value, { categories }) => categories[value] || exact(value);
    const rows = this.example.rows.map((row) => row.map((value, at) => cell(value, this.columns[at])));
    this.setCsv(writeCsv(this.columns.map(({ name }) => name), rows), this.example.name);
  }

  async readFile(input) {
    const [file] = input.files;
    if (!file) return;
    if (file.size > LARGEST_FILE) this.results.fail(`${file.name} is larger than 16 MiB: use rnnserve stream for it.`);
    else this.setCsv(await file.text(), file.name);
    input.value = "";
  }

  /** Take a CSV: a long one beside the field, which would take seconds to show it. */
  setCsv(text, name = "") {
    const isLong = text.length > LONGEST_SHOWN;
    this.file = isLong ? text : null;
    $("csv").value = isLong ? "" : text;
    $("csv").placeholder = isLong ? `${name}: ${count(text.length / 1024)} KiB, ready` : "";
  }

  /** What is to be sent, by the source that is chosen. */
  rows() {
    const { source } = this;
    if (source === "csv" && this.chunk) return this.signal();
    if (source === "csv") return readCsv(this.csv, this.columns);
    if (source === "text") return readText($("text").value, this.columns);
    if (source === "draw") return this.drawn();
    return this.example.rows;
  }

  signal() {
    const { rows, rest } = readSignal(this.csv, this.columns, this.chunk);
    if (!rows.length) throw new InputError(`${rest} samples are no whole chunk, which has ${this.chunk}.`);
    this.remark = rest ? `The last ${rest} samples are no whole chunk, and are left out.` : "";
    return rows;
  }

  drawn() {
    if (this.chunk) return stretch(this.curve.values, this.chunk);
    const at = Number($("draw-feature").value);
    const others = $("draw-others").value;
    const base = this.example?.rows || [this.columns.map(() => 0)];
    return this.curve.values.map((value, step) => {
      const row = others === "example" ? base[step % base.length] : others === "hold" ? base[0] : this.columns.map(() => 0);
      return row.map((each, index) => (index === at ? value : each));
    });
  }

  start() {
    if (!this.whole || this.run) return;
    if (this.whole.spec.generation) {
      this.begin((on) => this.generate.start(on));
      if (this.run) this.reveal();
      return;
    }
    let rows;
    this.remark = "";
    try {
      rows = this.rows();
    } catch (error) {
      if (!(error instanceof InputError)) throw error;
      this.results.fail(error.message);
      return;
    }
    this.preview(rows);
    this.results.fail(this.remark);
    this.reveal();
    const chips = $("input-tokens").children;
    this.begin((on) => {
      const answer = (position, outputs, latencies) => {
        this.results.take(position, outputs, latencies);
        for (let step = position; step < position + latencies.length; step += 1) chips[step]?.classList.add("done");
      };
      const warn = (text) => this.results.fail(text);
      return new Stepping(this.model, this.inputs, this.given.tensors(1), rows, () => this.rate, { ...on, answer, warn });
    });
  }

  /** Bring the results into view where they are not, as on a phone. */
  reveal() {
    if ($("results").getBoundingClientRect().top > window.innerHeight * 0.7) $("results").scrollIntoView();
  }

  begin(make) {
    const end = (text) => {
      this.run = null;
      this.results.finish(text);
      this.showButtons();
    };
    try {
      this.run = make({ end });
    } catch (error) {
      if (!(error instanceof InputError)) throw error;
      this.results.fail(error.message);
    }
    this.showButtons();
  }

  pause() {
    if (this.run.isPaused) this.run.resume();
    else this.run.pause();
    this.showButtons();
  }

  showButtons() {
    const isRunning = this.run !== null;
    const focused = document.activeElement;
    $("start").disabled = isRunning || !this.whole;
    $("stop").disabled = !isRunning;
    $("pause").disabled = !isRunning || !this.run.pause;
    $("pause").hidden = Boolean(this.whole?.spec.generation);
    say($("pause"), isRunning && this.run.isPaused ? "Resume" : "Pause");
    // A button that goes out under the focus would take it along.
    if (focused === $("start") && isRunning) $("stop").focus();
    else if ((focused === $("stop") || focused === $("pause")) && !isRunning) $("start").focus();
  }

  showRate() {
    const { rate } = this;
    const text = Number.isFinite(rate) ? `${format(rate < 10 ? Number(rate.toFixed(1)) : Math.round(rate))} steps/s` : "as fast as it goes";
    say($("rate-value"), text);
    $("rate").setAttribute("aria-valuetext", text);
  }
}

function spanOf(values) {
  const finite = values.filter(Number.isFinite);
  return [Math.min(...finite), Math.max(...finite)];
}

function named({ name, unit }) {
  return unit ? `${name} (${unit})` : name;
}
