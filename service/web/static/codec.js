// Tensors between JavaScript and the wire: raw little-endian bytes in base64.

const ARRAYS = {
  float32: Float32Array,
  float64: Float64Array,
  int32: Int32Array,
  int64: BigInt64Array,
  bool: Uint8Array,
};

/** Bytes of numbers as base64. */
export function encode(dtype, numbers) {
  const Kind = ARRAYS[dtype];
  const typed = dtype === "int64" ? Kind.from(numbers, (each) => BigInt(Math.trunc(each))) : Kind.from(numbers);
  const bytes = new Uint8Array(typed.buffer);
  let text = "";
  for (let at = 0; at < bytes.length; at += 0x8000) text += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  return btoa(text);
}

/** Numbers of base64; ids of 64 bits become plain numbers, which a vocabulary never is too large for. */
export function decode(dtype, text) {
  const raw = atob(text || "");
  const bytes = new Uint8Array(raw.length);
  for (let at = 0; at < raw.length; at += 1) bytes[at] = raw.charCodeAt(at);
  const typed = new ARRAYS[dtype](bytes.buffer);
  return dtype === "int64" ? Array.from(typed, Number) : Array.from(typed);
}

/** Elements of a shape. */
export function sizeOf(shape) {
  return shape.reduce((product, each) => product * Number(each), 1);
}

/** A value in as few digits as tell it apart for people. */
export function format(value) {
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
}

/** A float32 in the fewest digits that read back as the same. */
export function exact(value) {
  if (!Number.isFinite(value)) return String(value);
  for (let digits = 6; digits <= 9; digits += 1) {
    const text = value.toPrecision(digits);
    if (Math.fround(Number(text)) === value) return String(Number(text));
  }
  return String(value);
}

/** A count with its thousands apart. */
export function count(value) {
  return Math.round(value).toLocaleString("en");
}
