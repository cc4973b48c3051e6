// Fields of what a sequence is given once: a number for each element, or one of some categories.

import { decode, encode, sizeOf } from "./codec.js";
import { fill, h } from "./dom.js";

export class ContextFields {
  /** contexts: per-sequence inputs; prefix: of the fields' ids. */
  constructor(contexts, prefix) {
    this.contexts = contexts;
    this.fields = new Map();
    this.parts = contexts.flatMap((context) => this.make(context, prefix));
  }

  make(context, prefix) {
    const add = (at, label, input) => {
      input.id = `${prefix}-${context.name}-${at}`;
      this.fields.set(`${context.name}.${at}`, input);
      return field(input.id, label, input);
    };
    if (context.categories.length && !context.row_shape.length) {
      const select = h("select", {});
      fill(select, context.categories.map((text, id) => ({ value: String(id), text: text || "any other" })));
      return [add(0, context.description || context.name, select)];
    }
    const name = (at) => context.element_names[at] || (sizeOf(context.row_shape) === 1 ? context.name : `${context.name}[${at}]`);
    return Array.from({ length: sizeOf(context.row_shape) }, (_, at) => add(at, name(at), number(0, null, null, "any")));
  }

  /** Fill the fields from an example. */
  take({ inputs }) {
    for (const { name } of this.contexts) {
      decode(inputs[name].dtype, inputs[name].data).forEach((value, at) => {
        this.fields.get(`${name}.${at}`).value = String(value);
      });
    }
  }

  /** Tensors of a request, the same for each of some sequences. */
  tensors(num) {
    return this.contexts.map(({ name, dtype, row_shape }) => {
      const row = Array.from({ length: sizeOf(row_shape) }, (_, at) => Number(this.fields.get(`${name}.${at}`).value));
      return { name, data: encode(dtype, Array.from({ length: num }, () => row).flat()) };
    });
  }
}

/** A field for a number. */
export function number(value, min, max, step = 1) {
  return h("input", { type: "number", value, min, max, step, inputmode: "decimal" });
}

/** A field with its label, and a remark. */
export function field(id, label, input, note) {
  return h("div", { class: "field" }, h("label", { for: id }, label), input, note ? h("p", { class: "note" }, note) : null);
}
