// The models: a line each, which opens to all that the file says of itself.

import { get } from "./api.js";
import { count, format } from "./codec.js";
import { $, h, say } from "./dom.js";

const VERDICTS = { exact: "good", rounding: "warn", coupled: "bad" };

export class ModelList {
  /** onTry: called with a model that is to be tried. */
  constructor(onTry) {
    this.onTry = onTry;
    this.live = new Map();
  }

  show(models, broken) {
    const open = new Set([...$("model-list").querySelectorAll("details[open]")].map((each) => each.dataset.key));
    this.live.clear();
    const items = models.map((model) => this.item(model, models, open.has(`${model.name}/${model.version}`)));
    const faults = broken.map(({ name, version, error }) =>
      h("div", { class: "card broken" }, h("b", {}, `${name}${version ? `, version ${version}` : ""} is not served`), h("p", {}, error)),
    );
    const empty = h("p", { class: "card empty" }, "No model is served. Export one into the repository, and it is listed here.");
    $("model-list").replaceChildren(...(items.length || faults.length ? [...items, ...faults] : [empty]));
    const names = new Set(models.map(({ name }) => name)).size;
    say($("models-hint"), `${names} ${names === 1 ? "model" : "models"}, ${models.length} ${models.length === 1 ? "version" : "versions"}`);
  }

  take(stats, rates) {
    for (const model of stats.models) {
      const key = `${model.name}/${model.version}`;
      const element = this.live.get(key);
      if (element) say(element, `${count(model.sessions)} live · ${count(rates.get(key) || 0)} steps/s`);
    }
  }

  item(model, models, isOpen) {
    const key = `${model.name}/${model.version}`;
    const newest = Math.max(...models.filter(({ name }) => name === model.name).map(({ version }) => version));
    const live = h("span", { class: "live" });
    this.live.set(key, live);
    const body = h("div", { class: "body" }, h("p", { class: "note" }, "Loading"));
    const mark = models.filter(({ name }) => name === model.name).length > 1 && model.version === newest ? ", newest" : "";
    const item = h(
      "details",
      { class: "card model", "data-key": key },
      h(
        "summary",
        {},
        h("h3", { class: "title" }, model.name, h("small", {}, ` version ${model.version}${mark}`)),
        h(
          "span",
          { class: "chips" },
          h("span", { class: "chip" }, layersOf(model)),
          h("span", { class: "chip" }, model.topology),
          h("span", { class: "chip" }, model.step_mode),
          h("span", { class: `chip ${VERDICTS[model.exactness.verdict]}` }, model.exactness.verdict),
        ),
        live,
      ),
      body,
    );
    item.addEventListener("toggle", async () => {
      if (!item.open || item.dataset.loaded) return;
      item.dataset.loaded = "yes";
      try {
        const whole = await get(`api/models/${encodeURIComponent(model.name)}/versions/${model.version}`);
        body.replaceChildren(...this.content(whole));
      } catch (error) {
        delete item.dataset.loaded;
        body.replaceChildren(h("p", { class: "error" }, error.message));
      }
    });
    item.open = isOpen;
    return item;
  }

  content(model) {
    const { spec } = model;
    const { training, parity } = spec;
    const facts = [
      ["Layers", layersOf(model)],
      ["Size", `${model.num_parameters ? `${count(model.num_parameters)} parameters in ` : ""}${count(model.num_bytes / 1024)} KiB`],
      ["Trained on", training.data_set + (training.license ? ` (${training.license})` : "")],
      ["Step mode", `${model.step_mode}: ${model.step_mode_reason}`],
      ["In a batch", `${model.exactness.verdict}: ${model.exactness.detail}`],
      ["Runs on", model.placement],
      [
        "Against the trainer",
        parity.num_cases ? `largest difference ${format(parity.max_abs_error)} in ${parity.num_cases} cases` : "not compared",
      ],
      ["SHA-256", h("code", {}, model.digest), "wide"],
    ];
    if (spec.quantization) facts.splice(2, 0, ["Quantized", spec.quantization.mode ?? "8-bit weights"]);
    return [
      h("dl", { class: "about" }, ...facts.map(([name, value, kind]) => h("div", { class: kind }, h("dt", {}, name), h("dd", {}, value)))),
      ...spec.graphs.flatMap((graph) => [
        tensors(spec.graphs.length > 1 ? `Inputs of the ${graph.role}` : "Inputs", graph.inputs),
        tensors(spec.graphs.length > 1 ? `Outputs of the ${graph.role}` : "Outputs", graph.outputs),
        states(graph),
      ]),
      metrics(training.metrics),
      spec.labels.length ? words("Labels", spec.labels) : null,
      spec.vocabulary.length ? words("Vocabulary", spec.vocabulary) : null,
      h(
        "div",
        { class: "row" },
        h("button", { type: "button", on: { click: () => this.onTry(model) } }, `Try ${model.name} ${model.version}`),
        h("a", { href: `api/models/${encodeURIComponent(model.name)}/versions/${model.version}`, class: "note" }, "The whole spec as JSON"),
      ),
    ].filter(Boolean);
  }
}

function layersOf({ layers, task }) {
  return layers.map((each) => `${each.directions === 2 ? "bi" : ""}${each.cell} ${each.hidden}`).join(" + ") || task; // nothing is known of the layers of a model from elsewhere
}

function shape(tensor) {
  const axis = { per_step: "time", per_source_step: "source time", per_sequence: "", shared: "" }[tensor.layout];
  return `[${[axis, ...tensor.row_shape].filter((each) => each !== "").join(", ")}]`;
}

function table(title, head, rows) {
  return h(
    "div",
    {},
    h("h3", {}, title),
    h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": title },
      h(
        "table",
        {},
        h("thead", {}, h("tr", {}, ...head.map((each) => h("th", { scope: "col" }, each)))),
        h("tbody", {}, ...rows.map((row) => h("tr", {}, ...row.map((cell, at) => h("td", { class: at === row.length - 1 ? "names" : null }, cell))))),
      ),
    ),
  );
}

function tensors(title, list) {
  const rows = list.map((each) => {
    const names = each.categories.length ? each.categories.slice(1) : each.element_names;
    const shown = names.length > 24 ? [...names.slice(0, 24), `… ${names.length} in all`] : names;
    const about = [each.description, shown.join(", ")].filter(Boolean).join(": ");
    return [h("code", {}, each.name), each.layout.replaceAll("_", " "), `${each.dtype} ${shape(each)}`, each.unit || "–", about || "–"];
  });
  return table(title, ["Name", "Layout", "Type", "Unit", "What it is"], rows);
}

function states({ states: list, role }) {
  if (!list.length) return null;
  const rows = list.map((each) => [h("code", {}, each.name), `${each.dtype} [${each.row_shape.join(", ")}]`, each.initial || "zeros"]);
  return table(role === "model" ? "States" : `States of the ${role}`, ["Name", "Type", "Begins with"], rows);
}

function metrics(found) {
  const list = Object.entries(found);
  if (!list.length) return null;
  const items = list.map(([name, value]) => h("div", {}, h("dt", {}, name.replaceAll("_", " ")), h("dd", {}, format(value))));
  return h("div", {}, h("h3", {}, "Training"), h("dl", { class: "metrics" }, ...items));
}

function words(title, list) {
  const shown = list.slice(0, 60).map((each) => h("span", { class: "chip" }, each));
  const rest = list.length > 60 ? h("span", { class: "chip" }, `… ${list.length} in all`) : null;
  return h("div", {}, h("h3", {}, title), h("p", { class: "chips" }, ...shown, rest));
}
