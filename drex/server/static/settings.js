// The controls beside the output: what they show, and the request that they make.

import { $, make } from "./dom.js";

const SLIDERS = ["temperature", "top_p", "max_tokens"];
const RUN_AHEAD = ["off", "trusted", "lossless"];
/** Fields of a request that have a place of their own for what is wrong with them. */
const PLACES = { prompt: "prompt", seed: "seed", early_exit: "exits" };

export class Settings {
  constructor() {
    for (const name of SLIDERS) follow($(name));
  }

  /** Show the exit points and limits of a model. */
  use(card, depths) {
    this.depths = depths;
    const { exits, thresholds, kv_fill, run_ahead } = card.early_exit;
    this.exits = exits.map((layer, index) => thresholdControl(layer, thresholds[index], depths));
    $("thresholds").replaceChildren(...this.exits.map((exit) => exit.element));
    $("exits-note").textContent = note(card.early_exit);
    const most = $("max_tokens");
    most.max = Math.max(1, Math.min(card.max_model_len - 1, 1024));
    show(most);
    // Without exit points there is nothing to run ahead from.
    $("run-ahead-field").hidden = !exits.length;
    const modes = RUN_AHEAD.filter((mode) => mode !== "lossless" || kv_fill === "recompute");
    $("run_ahead").replaceChildren(...modes.map((mode) => make("option", { value: mode, textContent: mode })));
    $("run_ahead").value = run_ahead;
  }

  /** The two requests of a run: with early exit, and the same at full depth. They share a seed, and so their noise. */
  requests() {
    const seed = this.#seed();
    const common = {
      prompt: $("prompt").value,
      ...Object.fromEntries(SLIDERS.map((name) => [name, Number($(name).value)])),
      seed,
      logprobs: 0,
      return_exit_layers: true,
    };
    const early = { ...common, early_exit: this.#earlyExit() };
    if (!$("run-ahead-field").hidden) early.run_ahead = $("run_ahead").value;
    $("seed-used").textContent = $("seed").value.trim() ? "" : `was ${seed}`;
    return { early, full: { ...common, early_exit: false } };
  }

  #earlyExit() {
    const taken = this.exits.filter((exit) => exit.box.checked);
    if (!taken.length) return false;
    return { layers: taken.map((exit) => exit.layer), thresholds: taken.map((exit) => Number(exit.slider.value)) };
  }

  #seed() {
    const given = $("seed").value.trim();
    if (!given) return Math.floor(Math.random() * 1e5);
    if (!/^-?\d{1,15}$/.test(given)) {
      const error = new Error("A seed is a whole number; leave it empty for another one each run.");
      throw Object.assign(error, { param: "seed" });
    }
    return Number(given);
  }
}

/** Say what is wrong next to what caused it. */
export function showError(error) {
  const place = PLACES[error.param];
  $(place ? `${place}-error` : "ask-error").textContent = error.message;
  if (place && place !== "exits") {
    $(place).setAttribute("aria-invalid", "true");
    $(place).focus();
  }
}

export function clearErrors() {
  for (const place of [...Object.values(PLACES), "ask"]) {
    $(`${place}-error`).textContent = "";
    $(place).removeAttribute("aria-invalid");
  }
}

function note({ exits, criterion, schedule }) {
  if (!exits.length) return "This model has no exit points: every token goes to full depth.";
  const later = schedule === "constant" ? "" : ` Thresholds sink over the output by the schedule ${schedule}.`;
  return `Confidence: ${criterion}.${later} Without its tick an exit is not taken.`;
}

/** One exit point: whether it may be taken, and its threshold. A threshold of null means that it is not. */
function thresholdControl(layer, threshold, depths) {
  const id = `threshold-${layer}`;
  const box = make("input", { type: "checkbox", checked: threshold !== null, id: `exit-${layer}` });
  box.setAttribute("aria-label", `take the exit after layer ${layer}`);
  const value = Math.min(threshold ?? 1, 1);
  const slider = make("input", { type: "range", min: 0, max: 1, step: 0.01, value, id, className: "of-exit" });
  const output = make("span", { className: "value" });
  const label = make("label", { htmlFor: id, textContent: `after layer ${layer}` });
  const element = make("div", { className: "slider exit" }, box, label, slider, output);
  element.style.setProperty("--depth", depths.color(layer));
  box.addEventListener("change", () => (slider.disabled = !box.checked));
  slider.disabled = !box.checked;
  follow(slider);
  return { layer, box, slider, element };
}

/** Keep a slider's number beside it. */
function follow(slider) {
  slider.addEventListener("input", () => show(slider));
  show(slider);
}

function show(slider) {
  const output = slider.parentElement?.querySelector(".value");
  const whole = Number.isInteger(Number(slider.step));
  if (output) output.textContent = Number(slider.value).toFixed(whole ? 0 : 2);
}
