// Depth as it looks: a colour and an underline for each exit point, plain for full depth.
// Colours run from blue to amber and stay apart for colour-blind eyes; the shallower the exit, the thicker the line.

import { $, make } from "./dom.js";

export class Depths {
  /** @param exits layers after which there is an exit point; `layers`: of the model. */
  constructor(exits, layers) {
    Object.assign(this, { exits, layers, all: [...exits, layers] });
    const style = document.documentElement.style;
    exits.forEach((_, index) => {
      const share = exits.length > 1 ? (100 * index) / (exits.length - 1) : 0;
      // Through green, not through the grey that full depth has.
      style.setProperty(`--exit-${index}`, `color-mix(in oklch decreasing hue, var(--last) ${share}%, var(--first))`);
    });
  }

  /** The CSS colour of tokens that executed so many layers. */
  color(layer) {
    return layer < this.layers ? `var(--exit-${this.exits.indexOf(layer)})` : "var(--full)";
  }

  /** The thickness of their underline, in pixels. */
  line(layer) {
    if (layer === this.layers) return 1;
    const index = this.exits.indexOf(layer);
    return this.exits.length > 1 ? 4 - (2 * index) / (this.exits.length - 1) : 3;
  }

  name(layer) {
    return layer === this.layers ? `full depth, ${layer} layers` : `after layer ${layer}`;
  }

  /** Make an element look like tokens that executed so many layers. */
  paint(element, layer) {
    element.style.setProperty("--depth", this.color(layer));
    element.style.setProperty("--line", `${this.line(layer)}px`);
    element.classList.toggle("early", layer < this.layers);
  }

  showLegend() {
    const items = this.all.map((layer) => {
      const swatch = make("span", { className: "token", textContent: layer < this.layers ? "left" : "went to" });
      this.paint(swatch, layer);
      return make("li", {}, swatch, ` ${this.name(layer)}`);
    });
    $("legend").replaceChildren(...items);
  }
}
