// Four numbers of the whole server, each with its last minute.

import { Sparkline } from "./chart.js";
import { count, format } from "./codec.js";
import { $, h, say } from "./dom.js";

const KEPT = 60;
const TILES = [
  { key: "sessions", name: "Live sessions", show: count },
  { key: "stepsPerS", name: "Steps per second", show: count },
  { key: "meanBatch", name: "Mean batch", unit: "sequences a run", show: (value) => format(Number(value.toPrecision(3))) },
  { key: "queued", name: "Queued steps", show: count },
];

export class Overview {
  constructor() {
    this.before = null;
    this.rates = new Map();
    this.tiles = TILES.map((tile) => {
      const value = h("span", {}, "–");
      const unit = tile.unit ? h("small", {}, ` ${tile.unit}`) : null;
      const spark = h("div", { class: "spark" });
      $("tiles").append(
        h("div", { class: "card tile" }, h("p", { class: "name" }, tile.name), h("p", { class: "value" }, value, unit), spark),
      );
      return { ...tile, value, spark: new Sparkline(spark, KEPT) };
    });
  }

  /** Take the counters, and show what they grew by. */
  take(stats) {
    const before = this.before;
    this.before = stats;
    if (before === null) return;
    const seconds = stats.time - before.time;
    const earlier = new Map(before.models.map((each) => [`${each.name}/${each.version}`, each]));
    const total = { sessions: 0, stepsPerS: 0, queued: 0, runs: 0, rows: 0 };
    this.rates.clear();
    for (const model of stats.models) {
      const key = `${model.name}/${model.version}`;
      const past = earlier.get(key) || model;
      // A counter falls where a worker was started again: nothing is known of that second.
      const grown = (name) => Math.max(0, model[name] - past[name]);
      this.rates.set(key, grown("steps") / seconds);
      total.sessions += model.sessions;
      total.queued += model.queued_steps;
      total.stepsPerS += grown("steps") / seconds;
      total.runs += grown("runs");
      total.rows += grown("run_rows");
    }
    const values = { ...total, meanBatch: total.runs ? total.rows / total.runs : 0 };
    for (const tile of this.tiles) {
      say(tile.value, tile.show(values[tile.key]));
      tile.spark.push(values[tile.key]);
    }
  }

  /** The server is gone: differences begin anew. */
  forget() {
    this.before = null;
  }
}
