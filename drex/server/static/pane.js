// One stream of tokens: the text, coloured by depth as it comes, and what there is to measure of it.

import { make, percent, plural, short } from "./dom.js";

const REASONS = { length: "reached max tokens", stop: "ended by itself" };

export class Pane {
  constructor(title, hint) {
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
    Object.assign(this, { tokens: [], elements: [], first: null, latest: null, counts: new Map() });
    this.#of = new WeakMap();
    this.error.textContent = "";
  }

  #of = new WeakMap();
  #due = null;

  /** The token that an element shows, if it is one. */
  tokenOf(element) {
    return this.#of.get(element);
  }

  /** Get ready for a run: the prompt, and nothing after it. */
  begin(prompt, depths) {
    this.depths = depths;
    this.#clear();
    this.text.replaceChildren(make("span", { className: "prompt", textContent: prompt }));
    this.state.textContent = "waiting";
    this.element.classList.add("streaming");
    this.began = performance.now();
    this.#measure();
  }

  /** Take in a chunk of the stream. */
  add(chunk) {
    const now = performance.now();
    const choice = chunk.choices[0];
    if (!choice) return;
    const logprobs = choice.logprobs?.token_logprobs ?? [];
    const atEnd = this.text.scrollTop + this.text.clientHeight > this.text.scrollHeight - 30;
    choice.tokens.forEach((token, index) => this.#append({ ...token, logprob: logprobs[index] ?? NaN }));
    if (choice.tokens.length) {
      this.first ??= now;
      this.latest = now;
      this.state.textContent = "streaming";
    }
    if (choice.finish_reason) this.state.textContent = REASONS[choice.finish_reason];
    if (atEnd) this.text.scrollTop = this.text.scrollHeight;
    // Tokens may come faster than a screen shows them.
    this.#due ??= requestAnimationFrame(() => {
      this.#due = null;
      this.#measure();
    });
  }

  #append(token) {
    token.first = !this.tokens.length;
    const element = make("span", { className: "token", textContent: token.text });
    element.dataset.layer = token.exit_layer;
    if (token.text.includes("\n")) element.classList.add("line-end");
    // Bytes of a character that later tokens complete have no text of their own, but are to be found all the same.
    if (!token.text) element.classList.add("part");
    this.depths.paint(element, token.exit_layer);
    this.#of.set(element, token);
    this.tokens.push(token);
    this.elements.push(element);
    this.counts.set(token.exit_layer, (this.counts.get(token.exit_layer) ?? 0) + 1);
    this.text.append(element);
  }

  /** The stream is over: by itself, stopped by the user, or with an error. */
  end(error = null) {
    this.element.classList.remove("streaming");
    if (error?.name === "AbortError") this.state.textContent = "stopped";
    else if (error?.refused) this.state.textContent = "refused";
    else if (error) {
      this.state.textContent = "failed";
      this.error.textContent = error.message;
    }
    this.#measure();
  }

  /** Mark a token as the first that differs from the other text's; null: none does. */
  markDifference(index) {
    this.text.querySelector(".differs")?.classList.remove("differs");
    if (index !== null) this.elements[index]?.classList.add("differs");
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
    const { layers } = this.depths ?? {};
    const figures = {
      "tokens/s": short(this.rate),
      "mean depth": this.tokens.length ? `${short(this.meanDepth)} of ${layers}` : "–",
      "first token": this.first ? `${Math.round(this.first - this.began)} ms` : "–",
      tokens: String(this.tokens.length),
    };
    const items = Object.entries(figures).map(([name, value]) =>
      make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })),
    );
    this.figures.replaceChildren(...items);
    this.#share();
  }

  #share() {
    const total = this.tokens.length;
    const parts = (this.depths?.all ?? []).filter((layer) => this.counts.get(layer));
    const words = parts.map((layer) => `${percent(this.counts.get(layer) / total)} ${this.depths.name(layer)}`);
    this.shares.setAttribute("aria-label", words.join(", ") || "no tokens yet");
    this.shares.replaceChildren(
      ...parts.map((layer) => {
        const share = this.counts.get(layer) / total;
        const piece = make("span", { title: `${percent(share)} ${this.depths.name(layer)}` });
        piece.style.flexGrow = share;
        // Written only where there is room for it.
        if (share > 0.12) piece.textContent = `${layer < this.depths.layers ? layer : "full"} · ${percent(share)}`;
        this.depths.paint(piece, layer);
        return piece;
      }),
    );
  }
}
