// The playground: one prompt, served with early exit and, beside it, at full depth: in turn, because both at once would
// share the engine, and what they say of their speed would say nothing.

import { stream } from "./api.js";
import { $, make, plural, say } from "./dom.js";
import { Inspector } from "./inspector.js";
import { Pane } from "./pane.js";
import { Settings, clearErrors, showError } from "./settings.js";

/** Beginnings that the bundled model, which knows Python's standard library, has something to say to. */
export const EXAMPLES = {
  class: 'class Stack:\n    """A last-in, first-out collection."""\n\n    def __init__(self',
  test: "import unittest\n\nclass TestQueue(unittest.TestCase):\n    def test_",
  main: 'def main():\n    parser = argparse.ArgumentParser(description="',
  async: "async def read_lines(reader, limit):\n    while True:\n        line",
  docstring: 'def quicksort(items):\n    """Return a sorted copy of',
};

export class Playground {
  #early = new Pane("Early exit", "each token as deep as its confidence asks", () => this.#compare());
  #full = new Pane("Full depth", "the same request, all layers", () => this.#compare());
  #settings = new Settings();
  #running = null;

  /** @param openKey asks for an API key, with words that say why. */
  constructor(openKey) {
    this.openKey = openKey;
    this.inspector = new Inspector([this.#early, this.#full]);
    $("panes").append(this.#early.element, this.#full.element);
    $("prompt").value = EXAMPLES.class;
    $("examples").append(...Object.entries(EXAMPLES).map(([name, prompt]) => this.#example(name, prompt)));
    $("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.run();
    });
    $("stop").addEventListener("click", () => this.#running?.abort());
    $("compare").addEventListener("change", () => this.#arrange());
    this.#arrange();
  }

  #example(name, prompt) {
    const button = make("button", { type: "button", className: "quiet", textContent: name });
    button.addEventListener("click", () => {
      $("prompt").value = prompt;
      this.run();
    });
    return button;
  }

  #arrange() {
    for (const element of [this.#full.element, $("turns")]) element.hidden = !$("compare").checked;
    $("difference").hidden = !$("compare").checked;
  }

  use(card, depths) {
    this.model = card.id;
    this.depths = depths;
    this.#settings.use(card, depths);
  }

  async run() {
    if (!this.depths || this.#running) return;
    clearErrors();
    let requests;
    try {
      requests = this.#settings.requests();
    } catch (error) {
      showError(error);
      return;
    }
    const abort = (this.#running = new AbortController());
    const panes = $("compare").checked ? [this.#early, this.#full] : [this.#early];
    $("run").disabled = true;
    $("stop").disabled = false;
    this.inspector.hide();
    this.#compare();
    // On a narrow screen the texts are below the controls.
    if ($("output").getBoundingClientRect().top > innerHeight / 2) $("output").scrollIntoView();
    say("Running.");
    const bodies = [requests.early, requests.full];
    for (const pane of panes) pane.begin(requests.early.prompt, this.depths, "waits for its turn");
    // What is refused is refused at every depth: that is said once, beside what it is about. What fails, its pane says.
    let refusal = null;
    for (const [index, pane] of panes.entries()) {
      if (refusal) pane.end(refusal);
      else {
        const error = await this.#follow(pane, bodies[index], abort);
        if (error?.refused) refusal = error;
      }
    }
    this.#running = null;
    $("run").disabled = false;
    $("stop").disabled = true;
    if (refusal?.status === 401) this.openKey(refusal.message);
    else if (refusal) showError(refusal);
    else say(panes.map((pane) => pane.summary()).join(". "));
  }

  /** Show one stream until it ends. Returns the error that ended it, if one did. */
  async #follow(pane, body, abort) {
    pane.begin(body.prompt, this.depths, "waiting");
    try {
      for await (const chunk of stream({ ...body, model: this.model }, abort.signal)) {
        pane.add(chunk);
      }
      pane.end();
      return null;
    } catch (error) {
      pane.end(error);
      return error;
    }
  }

  /** Mark where the two texts first differ, as far as both have come. */
  #compare() {
    const [early, full] = [this.#early.tokens, this.#full.tokens];
    const both = Math.min(this.#early.elements.length, this.#full.elements.length);
    const at = early.findIndex((token, index) => index < both && token.id !== full[index].id);
    const differs = $("compare").checked && at >= 0;
    this.#early.markDifference(differs ? at : null);
    this.#full.markDifference(differs ? at : null);
    const words = !both
      ? ""
      : differs
        ? `The texts first differ at token ${at + 1}, marked ≠ in both. Both were drawn with the same noise.`
        : `The texts agree in all ${plural(both, "token")} so far.`;
    if ($("difference").textContent !== words) $("difference").textContent = words;
  }
}
