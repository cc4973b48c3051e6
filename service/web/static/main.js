// Puts the page together: theme, what is served, and the numbers that change.

import { get } from "./api.js";
import { $, say } from "./dom.js";
import { ModelList } from "./models.js";
import { Overview } from "./overview.js";
import { TryIt } from "./tryit.js";

const EVERY_MS = 1000;

function startTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const shown = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const show = () => {
    root.dataset.shown = shown();
    $("theme").setAttribute("aria-label", `Switch to the ${shown() === "dark" ? "light" : "dark"} theme`);
  };
  $("theme").addEventListener("click", () => {
    root.dataset.theme = shown() === "dark" ? "light" : "dark";
    try {
      localStorage.setItem("rnnserve.theme", root.dataset.theme);
    } catch {
      // Storage is off: the choice lasts as long as the page.
    }
    show();
  });
  dark.addEventListener("change", show);
  show();
}

class Page {
  constructor() {
    this.tryIt = new TryIt();
    this.models = new ModelList((model) => this.tryIt.choose(model));
    this.overview = new Overview();
    this.known = "";
    this.isAsking = false;
    document.addEventListener("visibilitychange", () => this.tick());
    setInterval(() => this.tick(), EVERY_MS);
    this.tick();
  }

  /** Ask for the numbers, and for the models where others are served than before; not while nobody looks. */
  async tick() {
    if (document.hidden || this.isAsking) return;
    this.isAsking = true;
    try {
      const stats = await get("api/stats");
      const names = [...stats.models.map(({ name, version }) => `${name}/${version}`), stats.broken].join();
      if (names !== this.known) {
        await this.load();
        this.known = names;
      }
      this.overview.take(stats);
      this.models.take(stats, this.overview.rates);
      const workers = stats.workers > 1 ? `, ${stats.workers} workers` : "";
      this.tell(stats.is_draining ? "warn" : "good", stats.is_draining ? "Draining" : `Serving${workers}`);
    } catch {
      this.overview.forget();
      this.tell("bad", "Not reachable");
    } finally {
      this.isAsking = false;
      document.body.classList.remove("loading");
    }
  }

  async load() {
    const content = await get("api/models");
    say($("server-version"), content.server.version);
    this.models.show(content.models, content.broken);
    await this.tryIt.show(content.models);
  }

  tell(state, text) {
    $("status").dataset.state = state;
    say($("status-text"), text);
  }
}

startTheme();
new Page();
