// Names below a chart: each shows or hides its line, and may have its newest value.

import { h, say } from "./dom.js";

export class Legend {
  constructor(host, chart) {
    this.host = host;
    this.chart = chart;
  }

  /** Name the first `most` lines of the chart; rest: a remark about what has no line. */
  show(most, rest = "") {
    this.values = this.chart.series.slice(0, most).map(() => h("i", {}));
    this.buttons = this.values.map((value, index) => {
      const { name, color } = this.chart.series[index];
      const act = () => {
        this.chart.toggle(index);
        this.mark();
      };
      return h("button", { type: "button", class: `key c${color}`, on: { click: act } }, h("span", {}, name), value);
    });
    this.host.replaceChildren(...this.buttons.map((each) => h("li", {}, each)), ...(rest ? [h("li", {}, rest)] : []));
    this.mark();
  }

  /** Say which lines are shown. */
  mark() {
    this.buttons.forEach((each, index) => each.setAttribute("aria-pressed", String(!this.chart.series[index].isHidden)));
  }

  set(index, text) {
    say(this.values[index], text);
  }

  lead(best) {
    this.buttons.forEach((each, index) => each.classList.toggle("leads", index === best));
  }
}
