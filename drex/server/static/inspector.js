// The card that says of a token how it left: each exit point's confidence against its threshold, and its probability.
// It follows the pointer, and the arrow keys inside a text.

import { $, make, percent, say } from "./dom.js";

export class Inspector {
  #card = $("inspector");

  /** @param panes that have tokens, by their elements. */
  constructor(panes) {
    for (const pane of panes) {
      const text = pane.text;
      text.addEventListener("pointerover", (event) => this.#point(pane, event.target));
      // A finger leaves as soon as it is lifted; what it pointed at stays until it points elsewhere.
      text.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.hide());
      text.addEventListener("keydown", (event) => this.#step(pane, event));
      text.addEventListener("blur", () => this.hide());
      text.addEventListener("scroll", () => this.hide(), { passive: true });
    }
    addEventListener("scroll", () => this.hide(), { passive: true });
    addEventListener("pointerdown", (event) => event.target.closest(".text") ?? this.hide());
    addEventListener("keydown", (event) => event.key === "Escape" && this.hide());
  }

  hide() {
    this.#card.hidden = true;
    this.current?.classList.remove("current");
    this.current = null;
  }

  #point(pane, target) {
    const token = pane.tokenOf(target);
    if (token) this.#show(pane, token, target);
    else this.hide();
  }

  #step(pane, event) {
    const elements = pane.elements;
    const at = elements.indexOf(this.current);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: elements.length - 1 }[event.key];
    const next = elements[to ?? -1];
    if (!next) return;
    event.preventDefault();
    next.scrollIntoView({ block: "nearest" });
    // The scrolling above hides the card, so it is shown after that.
    requestAnimationFrame(() => {
      this.#show(pane, pane.tokenOf(next), next);
      say(describe(pane.tokenOf(next), pane.depths));
    });
  }

  #show(pane, token, element) {
    this.hide();
    this.current = element;
    element.classList.add("current");
    const card = this.#card;
    card.replaceChildren(...content(token, pane.depths));
    card.hidden = false;
    // A token may run over several lines; the card goes to the first one's.
    const box = element.getClientRects()[0] ?? element.getBoundingClientRect();
    const below = box.bottom + card.offsetHeight + 14 < innerHeight;
    card.style.left = `${Math.max(8, Math.min(box.left, innerWidth - card.offsetWidth - 8))}px`;
    card.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - card.offsetHeight - 8)}px`;
  }
}

/** A token's text, with what can't be seen made visible. */
export const visible = (text) => JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"').replaceAll(" ", "␣") || "…";

function content(token, depths) {
  const head = make("p", { className: "what" }, make("code", { textContent: visible(token.text) }));
  head.append(make("span", { textContent: depths.name(token.exit_layer) }));
  depths.paint(head, token.exit_layer);
  const rows = token.checks.map((check) => row(check, depths));
  if (!rows.length) rows.push(make("p", { className: "note", textContent: why(token) }));
  const sure = `probability ${percent(Math.exp(token.logprob))} · log-probability ${token.logprob.toFixed(3)}`;
  return [head, ...rows, make("p", { className: "sure", textContent: `${sure} · token ${token.id}` })];
}

const why = (token) =>
  token.first ? "A request's first token always goes to full depth." : "No exit point was asked.";

/** Confidence as a bar, with a mark where the threshold is. */
function row({ layer, confidence, threshold }, depths) {
  const reached = confidence >= threshold;
  const bar = make("i", { className: "bar" }, make("b"), make("u"));
  bar.firstElementChild.style.width = `${100 * confidence}%`;
  bar.lastElementChild.style.left = `${100 * Math.min(threshold, 1)}%`;
  const against = `${confidence.toFixed(3)} ${reached ? "≥" : "<"} ${threshold.toFixed(2)}`;
  const parts = [make("span", { textContent: `after ${layer}` }), bar, make("span", { textContent: against })];
  const element = make("p", { className: "check-row" }, ...parts);
  element.append(make("em", { textContent: reached ? "exits" : "goes on" }));
  depths.paint(element, layer);
  return element;
}

function describe(token, depths) {
  const checks = token.checks.map(
    ({ layer, confidence, threshold }) => `after layer ${layer} ${confidence.toFixed(2)} of ${threshold.toFixed(2)}`,
  );
  const said = checks.length ? `confidence ${checks.join(", ")}` : why(token);
  return `${visible(token.text)}: ${depths.name(token.exit_layer)}; ${said}; log-probability ${token.logprob.toFixed(2)}`;
}
