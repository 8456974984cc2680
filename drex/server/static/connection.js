// The stream of the engine's states: open while somebody can see it, and opened again when it breaks.

const SHORTEST = 1000;
const LONGEST = 15000;

export class Connection {
  #source = null;
  #timer = 0;
  #wait = SHORTEST;

  /** @param hear gets each state of the engine; `tell`: how the connection is, as a word and in words. */
  constructor(hear, tell) {
    Object.assign(this, { hear, tell });
    document.addEventListener("visibilitychange", () => (document.hidden ? this.#pause() : this.#open()));
    if (document.hidden) this.#pause();
    else this.#open();
  }

  #open() {
    this.#close();
    this.tell("waiting", "connecting");
    const source = (this.#source = new EventSource("live"));
    source.onopen = () => {
      this.#wait = SHORTEST;
      this.tell("open", "live");
    };
    source.onmessage = (event) => this.hear(JSON.parse(event.data));
    // Browsers try again by themselves after some failures and not after others (429, 503): here it is always the same.
    source.onerror = () => {
      this.#close();
      this.tell("broken", "no connection, trying again");
      this.#timer = setTimeout(() => this.#open(), this.#wait);
      this.#wait = Math.min(2 * this.#wait, LONGEST);
    };
  }

  #pause() {
    this.#close();
    this.tell("paused", "paused");
  }

  #close() {
    clearTimeout(this.#timer);
    this.#source?.close();
    this.#source = null;
  }
}
