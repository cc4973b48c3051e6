// One session: steps are sent at a pace, and every answer is handed on as it comes.

import { call, rowsOf, tensor } from "./api.js";
import { tensorsOf } from "./columns.js";

const TICK_MS = 16;
const LARGEST = 64; // steps in one message, at most
const WINDOW = 256; // steps that may be unanswered

export class Stepping {
  /**
   * model   as /api/models tells it
   * inputs  its per-step inputs
   * given   tensors that the sequence is given once
   * rows    steps, a number a column
   * pace    () => steps per second, Infinity for as fast as possible
   * on      {answer(position, {name: rows}, latencies), warn(text), end(error text or "")}
   */
  constructor(model, inputs, given, rows, pace, on) {
    this.model = model;
    this.inputs = inputs;
    this.given = given;
    this.rows = rows;
    this.pace = pace;
    this.on = on;
    this.sent = 0;
    this.answered = 0;
    this.sentAt = [];
    this.credit = 0;
    this.isPaused = false;
    this.isOver = false;
    this.isWhole = model.step_mode === "buffered";
    this.socket = call(
      "api/stream",
      { open: { model: model.name, version: String(model.version) } },
      { message: (message) => this.take(message), end: (text) => this.end(text) },
    );
  }

  pause() {
    this.isPaused = true;
  }

  resume() {
    this.isPaused = false;
    this.lastTick = performance.now();
  }

  stop() {
    this.end("");
  }

  take(message) {
    if (message.opened) this.socket.send({ frame: { opens: [{}], tensors: this.given } });
    else if (message.drain) this.on.warn("The server is stopping: what is not done soon is cut off.");
    else if (message.answer?.opened?.length) {
      const [{ status }] = message.answer.opened;
      if (status) this.end(status.message);
      else this.begin();
    } else if (message.answer) this.answer(message.answer);
  }

  begin() {
    this.lastTick = performance.now();
    this.credit = 1;
    this.pump();
    this.timer = setInterval(() => this.pump(), TICK_MS);
  }

  /** Send what is due. */
  pump() {
    if (this.isPaused || this.isOver) return;
    const now = performance.now();
    const pace = this.pace();
    const earned = this.credit + ((now - this.lastTick) / 1000) * pace;
    this.credit = Number.isFinite(pace) ? Math.min(earned, Math.max(1, pace)) : Infinity; // a second's worth, at most
    this.lastTick = now;
    for (;;) {
      const room = this.isWhole ? Infinity : WINDOW - (this.sent - this.answered);
      const count = Math.min(Math.floor(this.credit), room, LARGEST, this.rows.length - this.sent);
      if (count < 1 || this.socket.waiting > 1 << 20) return;
      const rows = this.rows.slice(this.sent, this.sent + count);
      const frame = { handles: [0], lengths: [count], tensors: tensorsOf(rows, this.inputs) };
      this.sent += count;
      if (Number.isFinite(this.credit)) this.credit -= count;
      if (this.sent === this.rows.length) {
        frame.closes = [0];
        clearInterval(this.timer);
      }
      for (let step = 0; step < count; step += 1) this.sentAt.push(now);
      this.socket.send({ frame });
    }
  }

  /** Take what was ready together: one or more stretches of steps, their rows end to end. */
  answer(answer) {
    const now = performance.now();
    const parts = (answer.tensors || []).map((each) => ({ ...rowsOf(tensor(each)), isPerStep: each.layout === "LAYOUT_PER_STEP" }));
    let first = 0;
    (answer.handles || []).forEach((_, entry) => {
      const position = Number(answer.positions[entry]);
      const length = answer.lengths[entry];
      const outputs = {};
      for (const { name, rows, isPerStep } of parts) {
        outputs[name] = isPerStep ? rows.slice(first, first + length) : rows.slice(entry, entry + 1);
      }
      first += length;
      this.answered = position + length;
      this.on.answer(position, outputs, this.sentAt.slice(position, position + length).map((at) => now - at));
    });
    if (!Number.isFinite(this.pace())) this.pump();
    if (answer.errors?.length) this.end(answer.errors[0].status.message);
    else if (answer.closed?.length) this.end("");
  }

  end(text) {
    if (this.isOver) return;
    this.isOver = true;
    clearInterval(this.timer);
    this.socket.close();
    this.on.end(text);
  }
}
