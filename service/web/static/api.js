// The server's API: JSON by GET, and the calls of the native API over WebSockets, a message a text message.

import { decode } from "./codec.js";

const PATIENCE_MS = 10000;

/** GET a path as JSON; throws an Error with what the server says. */
export async function get(path) {
  const response = await fetch(path, { signal: AbortSignal.timeout(PATIENCE_MS) });
  const content = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(content.error?.message || `${path}: ${response.status} ${response.statusText}`);
  return content;
}

/** Open a socket for one call; handlers: message(object), end(error text or ""). */
export function call(path, first, handlers) {
  const url = new URL(path, document.baseURI);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  const socket = new WebSocket(url);
  let isOver = false;
  const end = (text) => {
    if (isOver) return;
    isOver = true;
    socket.close();
    handlers.end(text);
  };
  socket.addEventListener("open", () => socket.send(JSON.stringify(first)));
  socket.addEventListener("message", (event) => {
    if (isOver) return;
    const message = JSON.parse(event.data);
    if (message.status) end(message.status.code ? message.status.message : "");
    else handlers.message(message);
  });
  socket.addEventListener("close", (event) => {
    if (event.code === 1009) end("The message is larger than the server takes (max_message_bytes).");
    else end(event.reason || "The connection to the server ended.");
  });
  return {
    send: (message) => socket.send(JSON.stringify(message)),
    get waiting() {
      return socket.bufferedAmount;
    },
    close: () => {
      isOver = true;
      socket.close();
    },
  };
}

const DTYPES = {
  DATA_TYPE_FLOAT32: "float32",
  DATA_TYPE_FLOAT64: "float64",
  DATA_TYPE_INT64: "int64",
  DATA_TYPE_INT32: "int32",
  DATA_TYPE_BOOL: "bool",
};

/** A tensor of an answer: {name, shape, values}. */
export function tensor(message) {
  const shape = (message.shape || []).map(Number);
  return { name: message.name, shape, values: decode(DTYPES[message.dtype], message.data) };
}

/** A tensor cut along its first axis: {name, rows}. */
export function rowsOf({ name, shape, values }) {
  const width = values.length / shape[0];
  return { name, rows: Array.from({ length: shape[0] }, (_, row) => values.slice(row * width, (row + 1) * width)) };
}
