// The engine as it works: buffers, passes, throughput, requests and K/V over the last seconds, and where tokens left.

import { Background } from "./background.js";
import { Connection } from "./connection.js";
import { $, make, percent, short } from "./dom.js";
import { History, KEPT } from "./history.js";
import { Strip, scale } from "./strip.js";

/** What throughput is compared with: field of a state, name, and how its line looks. */
const YARDSTICKS = [
  ["ideal", "ideal", "var(--faint)", [1, 3]],
  ["theta_star", "θ* optimal", "var(--ink)", [6, 4]],
  ["full", "full depth", "var(--full)", [10, 3, 2, 3]],
];

export class Live {
  #history = new History();
  #connection = null;

  /** @param connected is called whenever the server is there (again). */
  constructor(connected) {
    this.connected = connected;
    this.background = new Background();
    $("span").addEventListener("change", () => this.draw());
  }

  /** Show the engine of a model, from now on. */
  use(depths) {
    this.depths = depths;
    this.#history.clear();
    this.#build();
    this.#connection ??= new Connection(
      (state) => {
        this.#history.add(state);
        this.draw();
      },
      (state, words) => {
        $("link").dataset.state = state;
        $("link").textContent = words;
        if (state === "open") this.connected();
      },
    );
  }

  #build() {
    const { exits } = this.depths;
    this.buffers = exits.map((layer) => new Strip(`rows that wait after layer ${layer}, over time`, { height: 54 }));
    this.lanes = new Strip("which segment the engine runs, over time", { height: 12 * (exits.length + 1) + 6 });
    this.throughput = new Strip("tokens a second, over time", { height: 92 });
    this.requests = new Strip("requests, over time", { height: 40 });
    this.slots = new Strip("K/V slots in use, over time", { height: 40, ticks: true });
    this.strips = [...this.buffers, this.lanes, this.throughput, this.requests, this.slots];
    this.values = new Map();
    const rows = [
      ...this.buffers.map((strip, index) => this.#row(strip, `Buffer after layer ${exits[index]}`, "rows wait")),
      this.#row(this.lanes, "Passes", "by segment"),
      this.#row(this.throughput, "Throughput", "tokens/s", legend()),
      this.#row(this.requests, "Requests", "running, waiting"),
      this.#row(this.slots, "K/V slots", "in use"),
    ];
    $("strips").replaceChildren(...rows);
    const names = ["tokens/s now", "of the ideal", "running", "waiting", "K/V in use"];
    $("gauges").replaceChildren(...names.map((name) => this.#gauge(name)));
    $("histogram").replaceChildren(...this.depths.all.map((layer) => this.#histogramRow(layer)));
  }

  #row(strip, title, unit, ...more) {
    const value = make("b", { textContent: "–" });
    this.values.set(strip, value);
    const head = make("div", { className: "strip-head" }, make("h3", { textContent: title }), value);
    head.append(make("small", { textContent: unit }), ...more);
    return make("div", { className: "strip" }, head, strip.canvas);
  }

  #gauge(name) {
    const value = make("dd", { textContent: "–" });
    this.values.set(name, value);
    return make("div", {}, make("dt", { textContent: name }), value);
  }

  #histogramRow(layer) {
    const bar = make("i", { className: "bar" }, make("b"), make("u"));
    this.depths.paint(bar, layer);
    const name = layer === this.depths.layers ? `${layer}, full` : String(layer);
    const cells = ["share", "tokens", "start"].map(() => make("td", {}));
    cells[0].append(make("div", {}, bar, make("span")));
    const row = make("tr", {}, make("th", { scope: "row", textContent: name }), ...cells);
    this.values.set(layer, { bar, cells });
    return row;
  }

  /** Draw in the colours of another theme. */
  recolor() {
    for (const strip of this.strips ?? []) strip.forgetColors();
    this.draw();
  }

  /** Draw everything as of the latest state. */
  draw() {
    const history = this.#history;
    const state = history.states.at(-1);
    if (!state) return;
    const span = Number(document.querySelector("input[name=span]:checked").value);
    this.#drawBuffers(state, span);
    this.#drawPasses(span);
    this.#drawThroughput(state, span);
    this.#drawLevels(state, span);
    this.#write(state, span);
    this.#writeHistogram(state, span);
  }

  #strip(strip, span, marks, draw) {
    strip.redraw = () => {
      if (strip.begin(this.#history.now, span, marks)) draw(strip);
    };
    strip.redraw();
  }

  #drawBuffers(state, span) {
    const all = this.buffers.map((_, index) => this.#history.buffer(index));
    // One scale for all, so that they can be compared.
    const most = Math.max(4, this.#history.most(all, span));
    this.buffers.forEach((strip, index) => {
      const layer = this.depths.exits[index];
      this.#strip(strip, span, scale(most), () => strip.area(all[index], this.depths.color(layer)));
      this.values.get(strip).textContent = String(state.buffered[layer]);
    });
  }

  #drawPasses(span) {
    const colors = [...this.depths.exits, this.depths.layers].map((layer) => this.depths.color(layer));
    const last = colors.length - 1;
    const blocks = this.#history.passes.map(({ time, seconds, segment }) => {
      return { from: time - seconds, to: time, lane: last - segment, color: colors[segment] };
    });
    // Each lane is marked by its segment, the first on top, as a token goes down through the layers.
    const marks = [...colors, ""].map((_, lane) => [lane, lane ? String(colors.length - lane) : ""]);
    this.#strip(this.lanes, span, marks, (strip) => strip.lanes(blocks));
    const recent = this.#history.passes.filter((pass) => pass.time > this.#history.now - 2);
    const rows = recent.reduce((sum, pass) => sum + pass.rows, 0);
    this.values.get(this.lanes).textContent = recent.length ? `${Math.round(recent.length / 2)}/s` : "0/s";
    this.values.get(this.lanes).title = recent.length ? `${short(rows / recent.length)} rows each` : "";
  }

  #drawThroughput(state, span) {
    const history = this.#history;
    const achieved = history.line((one) => (one.running ? one.achieved : null));
    const yardsticks = YARDSTICKS.map(([field]) => history.line((one) => (one.running ? one[field] : null)));
    const most = Math.max(10, history.most([achieved, ...yardsticks], span));
    this.#strip(this.throughput, span, scale(most), (strip) => {
      yardsticks.forEach((points, index) => strip.line(points, YARDSTICKS[index][2], { dash: YARDSTICKS[index][3] }));
      strip.line(achieved, "var(--achieved)", { width: 2.5 });
    });
    this.values.get(this.throughput).textContent = short(state.running ? state.achieved : null);
  }

  #drawLevels(state, span) {
    const history = this.#history;
    const [running, waiting] = [history.line((one) => one.running), history.line((one) => one.waiting)];
    const most = Math.max(4, history.most([running, waiting], span));
    this.#strip(this.requests, span, scale(most), (strip) => {
      strip.area(running, "var(--level)");
      const some = waiting.map(([time, count]) => [time, count || null]);
      strip.line(some, "var(--ink)", { dash: [3, 2] });
    });
    this.values.get(this.requests).textContent = String(state.running);
    this.values.get(this.requests).nextElementSibling.textContent = `running, ${state.waiting} waiting`;
    const share = history.line((one) => (100 * one.slots_in_use) / one.slots);
    const marks = scale(Math.max(1, history.most([share], span)), " %");
    this.#strip(this.slots, span, marks, (strip) => strip.area(share, "var(--level)"));
    this.values.get(this.slots).textContent = state.slots_in_use.toLocaleString("en");
  }

  /** What was achieved of the ideal, over the time shown: both follow the load, but not at the same pace. */
  #ofIdeal(span) {
    const { now, states } = this.#history;
    const known = states.filter(({ time, running, ideal }) => time >= now - span && running && ideal);
    const sum = (read) => known.reduce((total, state) => total + read(state), 0);
    return sum((state) => state.achieved) / sum((state) => state.ideal);
  }

  #write(state, span) {
    const { seconds, of } = this.#history.growth((one) => ({ tokens: one.tokens }), 1);
    const write = (name, text) => (this.values.get(name).textContent = text);
    write("tokens/s now", seconds ? short(of.tokens / seconds) : "–");
    write("of the ideal", percent(this.#ofIdeal(span)));
    write("running", String(state.running));
    write("waiting", String(state.waiting));
    write("K/V in use", percent(state.slots_in_use / state.slots));
    const idle = !state.running && !state.waiting;
    $("live-note").textContent = idle ? "Idle: run a prompt, or add background load to see buffers fill." : "";
  }

  #writeHistogram(state, span) {
    const { of } = this.#history.growth((one) => one.exits, span);
    const sum = (counts) => Object.values(counts).reduce((total, count) => total + count, 0);
    const [recent, ever] = [sum(of), sum(state.exits)];
    $("histogram-span").textContent = `last ${span === KEPT ? "half minute" : `${span} s`}`;
    for (const layer of this.depths.all) {
      const { bar, cells } = this.values.get(layer);
      const share = recent ? of[layer] / recent : 0;
      const always = ever ? state.exits[layer] / ever : 0;
      bar.firstElementChild.style.width = `${100 * share}%`;
      bar.lastElementChild.style.left = `${100 * always}%`;
      cells[0].firstElementChild.lastElementChild.textContent = recent ? percent(share) : "–";
      cells[1].textContent = of[layer].toLocaleString("en");
      cells[2].textContent = ever ? percent(always) : "–";
    }
  }
}

/** What the lines of throughput are. */
function legend() {
  const items = [["achieved", "var(--achieved)", []], ...YARDSTICKS.map(([, name, color, dash]) => [name, color, dash])];
  const list = make("ul", { className: "line-legend" });
  for (const [name, color, dash] of items) {
    const sample = make("i", { className: "sample" });
    sample.style.setProperty("--line-color", color);
    sample.dataset.dash = dash.length ? name.split(" ")[0] : "solid";
    list.append(make("li", {}, sample, name));
  }
  return list;
}
