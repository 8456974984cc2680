// Company for the playground's request: others, served over and over, so that buffers have something to hold.

import { complete } from "./api.js";
import { $ } from "./dom.js";
import { EXAMPLES } from "./playground.js";

/** Output tokens of each wave. A browser opens six connections to a server, so a wave of requests shares one; there are
 *  two waves, of different length, so that some always decode. */
const WAVES = [170, 260];
/** Milliseconds before it is tried again when the server is full. */
const PAUSE = 2000;

export class Background {
  #stop = null;

  constructor() {
    $("background").addEventListener("change", () => this.#change(Number($("background").value)));
  }

  #change(count) {
    this.#stop?.abort();
    $("background-error").textContent = "";
    if (!count) return;
    this.#stop = new AbortController();
    for (const tokens of WAVES) this.#serve(count / WAVES.length, tokens, this.#stop.signal);
  }

  async #serve(count, tokens, signal) {
    const examples = Object.values(EXAMPLES);
    const prompt = Array.from({ length: count }, (_, index) => examples[index % examples.length]);
    while (!signal.aborted) {
      try {
        await complete({ prompt, temperature: 0.8, max_tokens: tokens }, signal);
      } catch (error) {
        if (error.name === "AbortError") return;
        if (error.status !== 429) {
          this.#fail(error);
          return;
        }
        await new Promise((done) => setTimeout(done, PAUSE));
      }
    }
  }

  #fail(error) {
    this.#stop.abort();
    $("background").value = "0";
    $("background-error").textContent = `The background load has ended. ${error.message}`;
  }
}
