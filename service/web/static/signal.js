// Models whose step is a chunk of a signal, such as a frame of audio: samples in one column, and curves of samples.

import { isId, readCsv } from "./columns.js";

/** Samples in a step, where a model takes nothing but chunks of one signal; else 0. */
export function chunkOf(model, inputs, columns) {
  const isSignal = model.step_mode === "chunked" && inputs.length === 1 && inputs[0].row_shape.length === 1;
  return isSignal && !isId(columns[0]) ? inputs[0].row_shape[0] : 0;
}

/** CSV as {rows, rest}: a sample a line, of which the last `rest` are no whole chunk; or a chunk a line. */
export function readSignal(text, columns, chunk) {
  if (/[,;\t]|\S +\S/.test(text)) return { rows: readCsv(text, columns), rest: 0 };
  const samples = readCsv(text, [{ ...columns[0], name: columns[0].input }]).map(([sample]) => sample);
  const count = Math.floor(samples.length / chunk);
  const rows = Array.from({ length: count }, (_, step) => samples.slice(step * chunk, (step + 1) * chunk));
  return { rows, rest: samples.length - count * chunk };
}

/** A curve with a value a step, as chunks of samples along it. */
export function stretch(values, chunk) {
  const last = values.length * chunk - 1;
  const sample = (number) => {
    const at = (number / last) * (values.length - 1);
    const left = Math.min(Math.floor(at), values.length - 2);
    return values[left] + (at - left) * (values[left + 1] - values[left]);
  };
  return values.map((_, step) => Array.from({ length: chunk }, (__, at) => sample(step * chunk + at)));
}
