// What the engine was seen to do in the last half minute: its states, five a second, and its passes, every one.

export const KEPT = 30;
/** Seconds without a state after which nothing is known of the time between. */
const GAP = 1.5;

export class History {
  constructor() {
    this.clear();
  }

  clear() {
    Object.assign(this, { states: [], passes: [], waiting: [], now: 0 });
  }

  /** Take in a state. Its passes overlap with those of the state before. */
  add(state) {
    // A server that was started again counts from 0 again.
    if (state.time < this.now) this.clear();
    const before = this.states.at(-1);
    const gap = before && state.time - before.time > GAP;
    const known = this.passes.at(-1)?.number ?? -1;
    const fresh = state.passes.filter((pass) => pass.number > known);
    this.passes.push(...fresh);
    if (gap) this.waiting.push({ time: before.time, counts: null });
    // A pass tells what waited when it began; the state, what waits now.
    for (const pass of fresh) {
      if (pass.waiting) this.waiting.push({ time: pass.time - pass.seconds, counts: pass.waiting });
    }
    this.waiting.push({ time: state.time, counts: Object.values(state.buffered) });
    this.states.push(gap ? { ...state, afterGap: true } : state);
    this.now = state.time;
    this.#forget();
  }

  /** Drop what is older than what is shown, but for the last of it, from which lines start at the left edge. */
  #forget() {
    const start = this.now - KEPT;
    for (const list of [this.states, this.passes, this.waiting]) {
      const first = list.findIndex((one) => one.time >= start);
      if (first > 1) list.splice(0, first - 1);
    }
  }

  /** The highest value of some lines in the last seconds. */
  most(lines, seconds) {
    const start = this.now - seconds;
    // What held at the left edge began before it.
    const shown = lines.flatMap((points) => points.filter((_, index) => (points[index + 1]?.[0] ?? start) >= start));
    return Math.max(0, ...shown.map(([, value]) => value ?? 0));
  }

  /** Points [time, value] of a state's field; null where it isn't known. */
  line(read) {
    return this.states.flatMap((state) => [...(state.afterGap ? [[state.time, null]] : []), [state.time, read(state)]]);
  }

  /** Points [time, rows] of an exit point's buffer. */
  buffer(index) {
    return this.waiting.map(({ time, counts }) => [time, counts && counts[index]]);
  }

  /** Counts of a field that only grows, over so many last seconds: {seconds, of: the growth by key}. */
  growth(read, seconds) {
    const last = this.states.at(-1);
    const first = this.states.find((state) => state.time >= this.now - seconds) ?? last;
    const [before, after] = [read(first), read(last)];
    const of = Object.fromEntries(Object.entries(after).map(([name, count]) => [name, count - (before[name] ?? 0)]));
    return { seconds: last.time - first.time, of };
  }
}
