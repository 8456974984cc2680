// Small helpers for making elements and writing numbers. Text goes in as text, never as HTML.

export const $ = (id) => document.getElementById(id);

/** An element with properties, data attributes under `data`, and children that are nodes or text. */
export function make(tag, { data = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, data);
  element.append(...children);
  return element;
}

/** A number with as many digits as help: 0.53, 8.41, 123. A dash where there is none. */
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 100) return Math.round(value).toLocaleString("en");
  return value.toFixed(size >= 10 ? 1 : 2);
}

export const percent = (share) => (Number.isFinite(share) ? `${Math.round(100 * share)} %` : "–");

export const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

/** Tell those who can't see the page what has happened: for what ends, never for every token. */
export function say(words) {
  $("said").textContent = words;
}
