// A strip of time on a canvas, sharp at any density of pixels: steps that are filled, lines, and lanes of passes.
// Nothing here knows what an engine is.

const LEFT = 34;
const RIGHT = 6;
const TOP = 5;
const BOTTOM = 15;

export class Strip {
  #size = { width: 0, height: 0 };
  #colors = new Map();

  /** @param label for those who can't see it; `ticks`: whether the axis of time is written below. */
  constructor(label, { height, ticks = false }) {
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", label);
    this.canvas.style.height = `${height + (ticks ? BOTTOM : 4)}px`;
    this.bottom = ticks ? BOTTOM : 4;
    this.ticks = ticks;
    // A canvas can't use CSS variables; an element's computed colour is what they come to.
    this.probe = document.createElement("span");
    this.canvas.append(this.probe);
    new ResizeObserver(([entry]) => {
      this.#size = entry.contentRect;
      this.redraw?.();
    }).observe(this.canvas);
  }

  /** What a CSS colour comes to. Looking is slow, so it is remembered until the theme changes. */
  color(value) {
    if (!this.#colors.has(value)) {
      this.probe.style.color = value;
      this.#colors.set(value, getComputedStyle(this.probe).color);
    }
    return this.#colors.get(value);
  }

  forgetColors() {
    this.#colors.clear();
  }

  /** Clear it, for seconds from `now - span` to `now`. `marks` are [height, text] up the side, the highest last.
   *  Returns false while it has no size. */
  begin(now, span, marks) {
    const { width, height } = this.#size;
    if (!width) return false;
    const density = devicePixelRatio || 1;
    const [wide, high] = [Math.round(width * density), Math.round(height * density)];
    if (this.canvas.width !== wide || this.canvas.height !== high) Object.assign(this.canvas, { width: wide, height: high });
    const draw = (this.draw = this.canvas.getContext("2d"));
    draw.setTransform(density, 0, 0, density, 0, 0);
    draw.clearRect(0, 0, width, height);
    Object.assign(this, { now, span, top: marks.at(-1)[0], right: width - RIGHT, base: height - this.bottom });
    this.#axes(marks);
    return true;
  }

  x(time) {
    return LEFT + ((time - this.now + this.span) / this.span) * (this.right - LEFT);
  }

  y(value) {
    return this.base - (value / this.top) * (this.base - TOP);
  }

  #axes(marks) {
    const draw = this.draw;
    draw.font = `10.5px ${getComputedStyle(this.canvas).fontFamily}`;
    draw.fillStyle = this.color("var(--faint)");
    draw.strokeStyle = this.color("var(--grid)");
    draw.lineWidth = 1;
    draw.textAlign = "right";
    for (const [value, text] of marks) {
      const y = Math.round(this.y(value)) + 0.5;
      stroke(draw, [[LEFT, y], [this.right, y]]);
      draw.textBaseline = value ? "top" : "alphabetic";
      draw.fillText(text, LEFT - 5, y + 1);
    }
    draw.textBaseline = "alphabetic";
    if (!this.ticks) return;
    const step = this.span / 5;
    for (let back = 0; back <= 5; back++) {
      const x = this.x(this.now - back * step);
      draw.textAlign = back === 0 ? "right" : back === 5 ? "left" : "center";
      draw.fillText(back ? `−${+(back * step).toFixed(1)} s` : "now", x, this.base + 13);
    }
  }

  /** Fill below steps [time, value]: faintly up to the most in each column of pixels, strongly up to its mean. */
  area(points, color) {
    const columns = this.#columns(points);
    const draw = this.draw;
    draw.fillStyle = this.color(color);
    for (const [strength, read] of [[0.35, (column) => column.most], [1, (column) => column.sum / column.time]]) {
      draw.globalAlpha = strength;
      draw.beginPath();
      columns.forEach((column, index) => {
        const y = column && this.y(read(column));
        if (column && y < this.base) draw.rect(LEFT + index, y, 1, this.base - y);
      });
      draw.fill();
    }
    draw.globalAlpha = 1;
  }

  /** For each column of pixels: the time that is known of it, the integral over it, and the most there was. */
  #columns(points) {
    const columns = new Array(Math.max(0, Math.ceil(this.right - LEFT))).fill(null);
    points.forEach(([time, value], index) => {
      if (value === null) return;
      const end = points[index + 1]?.[0] ?? this.now;
      let from = Math.max(0, this.x(time) - LEFT);
      const to = Math.min(columns.length, this.x(end) - LEFT);
      while (from < to) {
        const at = Math.floor(from);
        const part = Math.min(to, at + 1) - from;
        const column = (columns[at] ??= { time: 0, sum: 0, most: 0 });
        column.time += part;
        column.sum += part * value;
        column.most = Math.max(column.most, value);
        from = at + 1;
      }
    });
    return columns;
  }

  /** A line through points [time, value], broken where a value is null. */
  line(points, color, { dash = [], width = 1.5 } = {}) {
    const draw = this.draw;
    draw.save();
    draw.beginPath();
    draw.rect(LEFT, 0, this.right - LEFT, this.base + 1);
    draw.clip();
    draw.strokeStyle = this.color(color);
    draw.lineWidth = width;
    draw.lineJoin = "round";
    draw.setLineDash(dash);
    let run = [];
    for (const [time, value] of [...points, [0, null]]) {
      if (value !== null) run.push([this.x(time), this.y(value)]);
      else {
        stroke(draw, run);
        run = [];
      }
    }
    draw.restore();
  }

  /** Blocks {from, to, lane, color}; lane 0 stands on the mark 0. */
  lanes(blocks) {
    const draw = this.draw;
    for (const { from, to, lane, color } of blocks) {
      const start = Math.max(LEFT, this.x(from));
      const width = Math.min(this.right, this.x(to)) - start;
      if (width <= 0) continue;
      draw.fillStyle = this.color(color);
      // A gap between blocks, where there is room for one.
      draw.fillRect(start, this.y(lane + 1) + 1, Math.max(0.6, width - 0.6), this.y(lane) - this.y(lane + 1) - 2);
    }
  }
}

function stroke(draw, points) {
  if (points.length < 2) return;
  draw.beginPath();
  points.forEach(([x, y], index) => (index ? draw.lineTo(x, y) : draw.moveTo(x, y)));
  draw.stroke();
}

/** Marks for values from 0 to at least `most`: the least of some round numbers that is no less. */
export function scale(most, unit = "") {
  const power = 10 ** Math.floor(Math.log10(most));
  const top = [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= most * 0.999);
  return [[0, "0"], [top, `${top.toLocaleString("en")}${unit}`]];
}
