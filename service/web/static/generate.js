// The form of a model that makes its outputs by itself, and what it makes, as it is made.

import { call, rowsOf, tensor } from "./api.js";
import { decode, encode, exact, format } from "./codec.js";
import { InputError } from "./columns.js";
import { ContextFields, field, number } from "./contexts.js";
import { $, fill, h, say } from "./dom.js";

const REASONS = { FINISH_REASON_END: "ended", FINISH_REASON_MAX_STEPS: "stopped at the most steps" };

export class GenerateForm {
  constructor(results) {
    this.results = results;
    this.host = $("generate-controls");
  }

  /** Make the fields of a model. */
  prepare(whole) {
    this.whole = whole;
    const { spec, examples } = whole;
    this.generation = spec.generation;
    const [graph, encoder] = spec.graphs;
    const encoded = new Set((encoder?.outputs || []).map(({ name }) => name));
    this.sources = (encoder?.inputs || []).filter(({ layout }) => layout === "per_step");
    const contexts = graph.inputs.filter(({ name, layout }) => layout === "per_sequence" && !encoded.has(name));
    this.token = graph.inputs.find(({ name }) => name === this.generation.token_input) || null;
    this.fields = new Map();
    const parts = [];
    if (examples.length) {
      const select = h("select", { id: "made-example" });
      fill(select, examples.map(({ name }, index) => ({ value: String(index), text: name })));
      select.addEventListener("change", () => this.take(examples[Number(select.value)]));
      const note = `${examples[0].source}${examples[0].license ? `, ${examples[0].license}` : ""}.`;
      parts.push(field("made-example", "Example", select, note));
    }
    for (const source of this.sources) {
      const about = source.categories.length ? "text" : "ids with spaces between";
      parts.push(this.add(source.name, `${source.description || source.name} (${about})`, h("input", { type: "text", spellcheck: "false" })));
    }
    this.given = new ContextFields(contexts, "made");
    parts.push(...this.given.parts);
    if (this.token && !this.sources.length) {
      const needs = this.generation.begin_id === null ? "" : ", may be empty";
      parts.push(this.add("prompt", `Begin with${needs}`, h("input", { type: "text", spellcheck: "false" })));
    }
    const numbers = [];
    if (this.token) {
      numbers.push(
        this.add("temperature", "Temperature", number(this.sources.length ? 0 : 0.8, 0, 10, "any")),
        this.add("top_k", "Top k", number(0, 0, spec.vocabulary.length || 1000000)),
        this.add("beams", "Beams", number(1, 1, 64)),
        this.add("num", "Sequences", number(this.sources.length ? 1 : 4, 1, 16)),
        this.add("seed", "Seed", number(1, 0, 2 ** 31)),
      );
    }
    numbers.push(this.add("max_steps", "Most steps", number(this.generation.max_steps, 1, this.generation.max_steps)));
    parts.push(h("div", { class: "numbers" }, ...numbers));
    if (this.token) parts.push(h("p", { class: "note" }, "Temperature 0 takes the likeliest; beams search, at temperature 0."));
    this.host.replaceChildren(...parts);
    if (examples.length) this.take(examples[0]);
    this.results.clear();
    $("output-figure").hidden = true;
  }

  add(key, label, input) {
    input.id = `made-${key}`;
    this.fields.set(key, input);
    return field(input.id, label, input);
  }

  /** Fill the fields from an example. */
  take({ inputs }) {
    for (const source of this.sources) {
      const ids = decode(inputs[source.name].dtype, inputs[source.name].data);
      this.fields.get(source.name).value = source.categories.length
        ? ids.map((id) => source.categories[id]).join(isOfCharacters(source) ? "" : " ")
        : ids.join(" ");
    }
    this.given.take({ inputs });
    if (this.token && inputs[this.token.name] && this.fields.has("prompt")) {
      const ids = decode(inputs[this.token.name].dtype, inputs[this.token.name].data);
      this.fields.get("prompt").value = ids.map((id) => this.whole.spec.vocabulary[id] ?? id).join(this.generation.separator);
    }
  }

  /** Ask for it; returns what can be stopped. */
  start({ end }) {
    const request = this.request();
    this.begin(request);
    const beganAt = performance.now();
    let socket = null;
    const finish = (text) => {
      socket.close();
      if (!text) this.tellAll();
      end(text);
    };
    socket = call("api/generate", request, {
      message: (message) => message.output && this.show(message.output, beganAt),
      end: finish,
    });
    return { stop: () => finish("") };
  }

  request() {
    const value = (key) => Number(this.fields.get(key)?.value || 0);
    const num = this.token ? Math.max(1, value("num")) : 1;
    const repeat = (ids) => Array.from({ length: num }, () => ids).flat();
    const inputs = [];
    for (const source of this.sources) {
      const ids = this.read(this.fields.get(source.name).value, source.categories, isOfCharacters(source) ? "" : " ", source.name);
      if (!ids.length) throw new InputError("Type a text first.");
      inputs.push({ name: source.name, data: encode(source.dtype, repeat(ids)), lengths: Array(num).fill(ids.length) });
    }
    inputs.push(...this.given.tensors(num));
    if (this.fields.has("prompt")) {
      const ids = this.read(this.fields.get("prompt").value, this.whole.spec.vocabulary, this.generation.separator, "the prompt");
      inputs.push({ name: this.token.name, data: encode(this.token.dtype, repeat(ids)), lengths: Array(num).fill(ids.length) });
    }
    const request = { model: this.whole.name, version: String(this.whole.version), inputs, max_steps: value("max_steps") };
    if (!this.token) return request;
    const temperature = value("temperature");
    if (temperature) {
      request.temperature = temperature;
      if (value("top_k")) request.top_k = value("top_k");
      request.seeds = Array.from({ length: num }, (_, at) => String(value("seed") + at));
    }
    if (value("beams") > 1) {
      request.beams = value("beams");
      request.num_hypotheses = Math.min(4, value("beams"));
    }
    return request;
  }

  /** Ids of a text: words of a vocabulary, the longest that fits first. */
  read(text, vocabulary, separator, what) {
    if (!vocabulary.length) {
      return text.split(/[\s,]+/).filter(Boolean).map((each) => {
        if (!/^\d+$/.test(each)) throw new InputError(`“${each.slice(0, 40)}” in ${what} is no id.`);
        return Number(each);
      });
    }
    const find = (word) => [word, word.toLowerCase(), word.toUpperCase()].map((each) => vocabulary.indexOf(each)).find((at) => at >= 0) ?? -1;
    const known = vocabulary.filter(Boolean).sort((one, other) => other.length - one.length);
    const ids = [];
    let rest = text.trim();
    while (rest) {
      const word = separator.trim() === "" && separator !== "" ? /^\S+/.exec(rest)[0] : known.find((each) => rest.startsWith(each)) || [...rest][0];
      const id = find(word);
      if (id < 0) throw new InputError(`“${word.slice(0, 40)}” in ${what} is not in the model's vocabulary: ${known.slice(-12).join(" ")} …`);
      ids.push(id);
      rest = rest.slice(word.length).trimStart();
    }
    return ids;
  }

  begin(request) {
    this.results.clear();
    this.made = new Map();
    this.numMade = 0;
    this.firstMs = null;
    const isText = Boolean(this.token);
    $("made").hidden = !isText;
    $("output-figure").hidden = isText;
    $("made").replaceChildren();
    if (!isText) {
      this.results.begin(this.whole, request.max_steps);
      return;
    }
    say($("latency-name"), "First output");
    this.results.whole = this.whole;
    this.results.table = () => ({ head: ["sequence", "hypothesis", "step", "id", "token", "log_probability"], rows: this.rows() });
  }

  show(output, beganAt) {
    const lengths = output.lengths || [];
    let at = 0;
    (output.sequences || []).forEach((sequence, entry) => {
      const hypothesis = output.hypotheses?.[entry] || 0;
      if (this.token) {
        const item = this.item(sequence, hypothesis);
        for (let step = 0; step < lengths[entry]; step += 1) this.append(item, Number(output.ids[at + step]), Number(output.log_probs[at + step]));
      }
      at += lengths[entry];
    });
    this.numMade += at;
    if (!this.token) {
      const parts = (output.tensors || []).map((each) => rowsOf(tensor(each)));
      const named = Object.fromEntries(parts.map(({ name, rows }) => [name, rows]));
      const latency = (performance.now() - beganAt) / Math.max(1, this.numMade);
      if (at) this.results.take(this.numMade - at, named, Array(at).fill(latency));
    } else {
      const seconds = (performance.now() - beganAt) / 1000;
      say($("fact-steps"), String(this.numMade));
      say($("fact-rate"), format(Math.round(this.numMade / seconds)));
      this.firstMs ??= seconds * 1000;
      say($("fact-latency"), `${format(Number(this.firstMs.toPrecision(3)))} ms`);
      $("download").disabled = false;
    }
    const ends = output.ends;
    (ends?.sequences || []).forEach((sequence, entry) => {
      if (!this.token) return;
      const item = this.item(sequence, ends.hypotheses?.[entry] || 0);
      const logProb = Number(ends.log_probs?.[entry] ?? 0);
      if (!item.ids.length) item.text.replaceChildren(h("em", {}, "nothing"));
      say(item.meta, `${REASONS[ends.reasons[entry]] || "ended"} after ${item.ids.length}, log-probability ${format(logProb)}`);
    });
  }

  item(sequence, hypothesis) {
    const key = `${sequence}.${hypothesis}`;
    if (!this.made.has(key)) {
      const text = h("p", { class: "text" });
      const meta = h("p", { class: "meta" }, "\u2026");
      $("made").append(h("div", { class: "made-item" }, text, meta));
      this.made.set(key, { sequence, hypothesis, text, meta, ids: [], logProbs: [] });
    }
    return this.made.get(key);
  }

  append(item, id, logProb) {
    const word = this.whole.spec.vocabulary[id] ?? String(id);
    const chance = Math.exp(logProb);
    const span = h("span", { title: `${(100 * chance).toFixed(1)}%` }, word);
    span.style.setProperty("--p", String(chance));
    if (item.ids.length && this.generation.separator) item.text.append(this.generation.separator);
    item.text.append(span);
    item.ids.push(id);
    item.logProbs.push(logProb);
  }

  /** What was made as rows. */
  rows() {
    return [...this.made.values()].flatMap(({ sequence, hypothesis, ids, logProbs }) =>
      ids.map((id, step) => [sequence, hypothesis, step, id, this.whole.spec.vocabulary[id] ?? "", exact(logProbs[step])]),
    );
  }

  tellAll() {
    if (this.token) say($("live"), `Done: ${[...this.made.values()].map(({ text }) => text.textContent).join("; ")}`);
  }
}

function isOfCharacters({ categories }) {
  return categories.length > 1 && categories.every((each) => each.length <= 1);
}
