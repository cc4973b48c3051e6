// What a step of a model is made of, as columns; and sequences as rows of numbers, from CSV, text or arrays.

import { decode, encode, sizeOf } from "./codec.js";

export class InputError extends Error {}

/** Columns of a step: [{input, dtype, name, unit, categories, numIds}], in the order of the model's inputs. */
export function columnsOf(inputs) {
  return inputs.flatMap((input) => {
    const width = sizeOf(input.row_shape);
    const units = input.unit.split(", "); // one for all, or one each
    return Array.from({ length: width }, (_, index) => ({
      input: input.name,
      dtype: input.dtype,
      name: input.element_names[index] || (width === 1 ? input.name : `${input.name}[${index}]`),
      unit: units.length === width ? units[index] : input.unit,
      categories: input.categories,
      numIds: input.num_ids,
    }));
  });
}

/** Whether a column holds an id, not a measured value. */
export function isId(column) {
  return column.numIds !== null || column.dtype.startsWith("int");
}

/** Whether a model reads characters, so that a text is a sequence. */
export function isText(columns) {
  return columns.length === 1 && columns[0].categories.length > 1 && columns[0].categories.every((each) => each.length <= 1);
}

/** Per-step inputs of an example as rows, a number a column. */
export function rowsOf(example, inputs) {
  const parts = inputs.map((input) => {
    const array = example.inputs[input.name];
    return { values: decode(array.dtype, array.data), width: sizeOf(input.row_shape), length: array.shape[0] };
  });
  return Array.from({ length: parts[0].length }, (_, step) =>
    parts.flatMap(({ values, width }) => values.slice(step * width, (step + 1) * width)),
  );
}

/** Rows as tensors of a request. */
export function tensorsOf(rows, inputs) {
  let first = 0;
  return inputs.map((input) => {
    const from = first;
    first += sizeOf(input.row_shape);
    const to = first;
    const numbers = [];
    for (const row of rows) for (let at = from; at < to; at += 1) numbers.push(row[at]);
    return { name: input.name, data: encode(input.dtype, numbers) };
  });
}

/** A text as ids, a character a row. */
export function readText(text, columns) {
  const { categories } = columns[0];
  const rows = Array.from(text, (character) => {
    const found = [character, character.toLowerCase(), character.toUpperCase()].map((each) => categories.indexOf(each));
    return [Math.max(0, found.find((each) => each > 0) ?? 0)];
  });
  if (!rows.length) throw new InputError("Type a text first: a character is a step.");
  return rows;
}

/** CSV as rows. A header is optional; one that names every column may have them in any order. */
export function readCsv(text, columns) {
  const lines = text.replace(/^\ufeff/, "").split(/\r\n|\n|\r/);
  const filled = lines.map((line, index) => ({ line, number: index + 1 })).filter(({ line }) => line.trim());
  if (!filled.length) throw new InputError("Paste rows first: a row a step.");
  const mark = ["\t", ";", ","].find((each) => filled[0].line.includes(each)) || (columns.length > 1 ? " " : ",");
  const cells = filled.map(({ line, number }) => ({ number, cells: split(line, mark, number) }));
  let order = columns.map((_, index) => index);
  const isHeader = cells[0].cells.some((cell, index) => Number.isNaN(value(cell, columns[index])));
  if (isHeader && cells[0].cells.length) {
    const named = columns.map(({ name }) => cells[0].cells.indexOf(name));
    const isNamed = named.every((each) => each >= 0);
    if (isNamed) order = named;
    else if (cells.length === 1 || cells[0].cells.length !== columns.length || cells[0].cells.some(isNumber)) {
      explain(cells[0], columns);
    }
    cells.shift();
  }
  if (!cells.length) throw new InputError("There is a header, and no rows below it.");
  return cells.map((row) => {
    if (row.cells.length < Math.max(...order) + 1 || (!isHeader && row.cells.length !== columns.length)) width(row, columns);
    return order.map((at, index) => {
      const found = value(row.cells[at], columns[index]);
      if (Number.isNaN(found) && !/^[+-]?nan$/i.test(row.cells[at])) unreadable(row, row.cells[at], columns[index]);
      return found;
    });
  });
}

/** The rows as CSV, with a header. */
export function writeCsv(names, rows) {
  const quote = (each) => (/[",\n]/.test(each) ? `"${each.replaceAll('"', '""')}"` : each);
  return `${[names.map(quote), ...rows].map((each) => each.join(",")).join("\n")}\n`;
}

function split(line, mark, number) {
  if (mark === " ") return line.trim().split(/\s+/);
  const found = [];
  let rest = line;
  for (;;) {
    const quoted = /^\s*"((?:[^"]|"")*)"\s*/.exec(rest);
    if (quoted) {
      found.push(quoted[1].replaceAll('""', '"'));
      rest = rest.slice(quoted[0].length);
      if (rest && !rest.startsWith(mark)) throw new InputError(`Line ${number}: text follows a closing quote.`);
    } else {
      const end = rest.indexOf(mark);
      found.push((end < 0 ? rest : rest.slice(0, end)).trim());
      rest = end < 0 ? "" : rest.slice(end);
    }
    if (!rest) return found;
    rest = rest.slice(mark.length);
  }
}

function isNumber(cell) {
  return cell !== "" && /^[+-]?(\d+\.?\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|inf(inity)?|nan)$/i.test(cell);
}

/** What a cell stands for; NaN where it can't be read. */
function value(cell, column) {
  if (cell === undefined || column === undefined) return NaN;
  if (column.categories.length) {
    const found = column.categories.indexOf(cell, 1);
    if (found > 0) return found;
  }
  if (!isNumber(cell)) return NaN;
  const infinite = /^([+-]?)inf/i.exec(cell);
  if (infinite) return infinite[1] === "-" ? -Infinity : Infinity;
  const number = Number(cell);
  return isId(column) && !Number.isInteger(number) ? NaN : number;
}

function width({ number, cells }, columns) {
  const names = columns.map(({ name }) => name);
  const shown = names.length > 6 ? [...names.slice(0, 3), "…", names.at(-1)] : names;
  throw new InputError(
    `Line ${number} has ${cells.length} ${cells.length === 1 ? "column" : "columns"}; the model takes ${columns.length}: ${shown.join(", ")}.`,
  );
}

function unreadable({ number }, cell, column) {
  const wanted = column.categories.length
    ? `one of ${column.categories.slice(1, 7).join(", ")}${column.categories.length > 7 ? ", …" : ""}, or its id`
    : isId(column)
      ? "a whole number"
      : "a number";
  throw new InputError(`Line ${number}, ${column.name}: “${cell.slice(0, 40)}” is not ${wanted}.`);
}

function explain(row, columns) {
  if (row.cells.length !== columns.length) width(row, columns);
  const at = row.cells.findIndex((cell, index) => Number.isNaN(value(cell, columns[index])));
  unreadable(row, row.cells[at], columns[at]);
}
