// One stream of tokens: the text, coloured by depth as it comes, and what there is to measure of it.

import { make, percent, plural, short } from "./dom.js";

const REASONS = { length: "reached max tokens", stop: "ended by itself" };
/** Milliseconds between two looks of the text. */
const PAUSE = 40;

export class Pane {
  /** @param rendered is called when more of the text is shown. */
  constructor(title, hint, rendered) {
    this.rendered = rendered;
    this.text = make("pre", { className: "text", tabIndex: 0 });
    this.text.setAttribute("role", "group");
    this.text.setAttribute("aria-label", `${title}: text`);
    this.text.setAttribute("aria-describedby", "token-help");
    this.state = make("span", { className: "state" });
    this.error = make("p", { className: "error" });
    this.error.setAttribute("role", "alert");
    this.figures = make("dl", { className: "figures" });
    this.shares = make("div", { className: "shares" });
    this.shares.setAttribute("role", "img");
    const head = make("header", {}, make("h3", { textContent: title }), make("small", { textContent: hint }), this.state);
    this.element = make("article", { className: "pane" }, head, this.text, this.error, this.shares, this.figures);
    this.title = title;
    this.text.append(make("span", { className: "note", textContent: "Run the prompt, or choose an example." }));
    this.#clear();
    this.#measure();
  }

  #clear() {
    Object.assign(this, { tokens: [], elements: [], first: null, latest: null, marked: null, counts: new Map() });
    this.#of = new WeakMap();
    this.error.textContent = "";
  }

  #of = new WeakMap();
  #due = null;
  #written = new Map();

  /** The token that an element shows, if it is one. */
  tokenOf(element) {
    return this.#of.get(element);
  }

  /** Get ready for a run: the prompt, nothing after it, and a word on what is waited for. */
  begin(prompt, depths, state) {
    if (this.depths !== depths) this.#paintShares(depths);
    this.depths = depths;
    this.#clear();
    this.text.replaceChildren(make("span", { className: "prompt", textContent: prompt }));
    this.reason = this.state.textContent = state;
    this.element.classList.add("streaming");
    this.began = performance.now();
    this.#measure();
  }

  #paintShares(depths) {
    const pieces = depths.all.map((layer) => {
      const piece = make("span", { data: { layer }, hidden: true });
      depths.paint(piece, layer);
      return piece;
    });
    this.shares.replaceChildren(...pieces);
  }

  /** Take in a chunk of the stream. It is shown soon, with others: drawing each token costs cores that the engine may
   *  want, where both are on one machine. */
  add(chunk) {
    const choice = chunk.choices[0];
    if (!choice) return;
    if (choice.tokens.length) {
      this.latest = performance.now();
      this.first ??= this.latest;
    }
    choice.tokens.forEach((token, index) => {
      const first = !this.tokens.length;
      this.tokens.push({ ...token, first, logprob: choice.logprobs.token_logprobs[index] });
      this.counts.set(token.exit_layer, (this.counts.get(token.exit_layer) ?? 0) + 1);
    });
    this.reason = choice.finish_reason ? REASONS[choice.finish_reason] : "streaming";
    this.#due ??= setTimeout(() => this.#render(), PAUSE);
  }

  /** Show what has come. */
  #render() {
    clearTimeout(this.#due);
    this.#due = null;
    const text = this.text;
    const atEnd = text.scrollTop + text.clientHeight > text.scrollHeight - 30;
    text.append(...this.tokens.slice(this.elements.length).map((token) => this.#element(token)));
    if (atEnd) text.scrollTop = text.scrollHeight;
    this.state.textContent = this.reason;
    this.#measure();
    this.rendered();
  }

  #element(token) {
    const element = make("span", { className: "token", textContent: token.text });
    element.dataset.layer = token.exit_layer;
    if (token.text.includes("\n")) element.classList.add("line-end");
    // Bytes of a character that later tokens complete have no text of their own, but are to be found all the same.
    if (!token.text) element.classList.add("part");
    this.depths.paint(element, token.exit_layer);
    this.#of.set(element, token);
    this.elements.push(element);
    return element;
  }

  /** The stream is over: by itself, stopped by the user, or with an error. */
  end(error = null) {
    this.element.classList.remove("streaming");
    if (error) this.reason = error.name === "AbortError" ? "stopped" : error.refused ? "refused" : "failed";
    if (this.reason === "failed") this.error.textContent = error.message;
    this.#render();
  }

  /** Mark a token as the first that differs from the other text's; null: none does. */
  markDifference(index) {
    const element = index === null ? null : this.elements[index];
    if (element === this.marked) return;
    this.marked?.classList.remove("differs");
    element?.classList.add("differs");
    this.marked = element;
  }

  get rate() {
    const seconds = (this.latest - this.first) / 1e3;
    return this.tokens.length > 1 && seconds > 0 ? (this.tokens.length - 1) / seconds : null;
  }

  get meanDepth() {
    const sum = this.tokens.reduce((total, token) => total + token.exit_layer, 0);
    return this.tokens.length ? sum / this.tokens.length : null;
  }

  summary() {
    return `${this.title}: ${plural(this.tokens.length, "token")}, mean depth ${short(this.meanDepth)}`;
  }

  #measure() {
    const measured = {
      "tokens/s": short(this.rate),
      "mean depth": this.tokens.length ? `${short(this.meanDepth)} of ${this.depths.layers}` : "–",
      "first token": this.first ? `${Math.round(this.first - this.began)} ms` : "–",
      tokens: String(this.tokens.length),
    };
    for (const [name, value] of Object.entries(measured)) {
      const written = this.#figure(name);
      if (written.textContent !== value) written.textContent = value;
    }
    this.#share();
  }

  /** Where a figure is written. */
  #figure(name) {
    if (!this.#written.has(name)) {
      const value = make("dd", {});
      this.#written.set(name, value);
      this.figures.append(make("div", {}, make("dt", { textContent: name }), value));
    }
    return this.#written.get(name);
  }

  #share() {
    const total = this.tokens.length;
    const words = [];
    for (const piece of this.shares.children) {
      const layer = Number(piece.dataset.layer);
      const count = this.counts.get(layer) ?? 0;
      piece.hidden = !count;
      if (!count) continue;
      const said = `${percent(count / total)} ${this.depths.name(layer)}`;
      words.push(said);
      piece.style.flexGrow = count;
      piece.title = said;
      // Written only where there is room for it.
      const label = `${layer < this.depths.layers ? layer : "full"} · ${percent(count / total)}`;
      piece.textContent = count / total > 0.12 ? label : "";
    }
    this.shares.setAttribute("aria-label", words.join(", ") || "no tokens yet");
  }
}
