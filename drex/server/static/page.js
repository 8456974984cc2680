// Puts the page together: the model's facts, the key, the theme, and the two halves, playground and engine.

import * as api from "./api.js";
import { $, say } from "./dom.js";
import { Depths } from "./depths.js";
import { Live } from "./live.js";
import { Playground } from "./playground.js";

const THEMES = ["auto", "light", "dark"];
const playground = new Playground(openKey);
const live = new Live(start);
let shown = "";

/** Ask which model there is: at the start, with another key, and when a server that was gone is back. */
async function start() {
  $("key-error").textContent = "";
  try {
    const card = await api.model();
    $("ask-error").textContent = "";
    const same = JSON.stringify({ ...card, created: 0 });
    if (same === shown) return;
    shown = same;
    const depths = new Depths(card.early_exit.exits, card.early_exit.layers);
    describe(card);
    depths.showLegend();
    playground.use(card, depths);
    live.use(depths);
  } catch (error) {
    if (error.status !== 401) $("ask-error").textContent = error.message;
    else openKey(api.key.get() ? "This key is not accepted here." : "This server wants an API key.");
  }
}

function describe(card) {
  const { exits, layers, criterion, kv_fill } = card.early_exit;
  $("model-name").textContent = card.id;
  const where = exits.length ? `exits after ${exits.join(", ")} · ${criterion} · K/V ${kv_fill}` : "no exit points";
  $("model-facts").textContent = `${layers} layers · ${where} · ${card.max_model_len} tokens`;
}

function openKey(words) {
  $("key").hidden = false;
  $("key-error").textContent = words;
  $("key-value").focus();
}

function chooseTheme(theme) {
  if (theme === "auto") {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem("drex-theme");
  } else {
    document.documentElement.dataset.theme = theme;
    localStorage.setItem("drex-theme", theme);
  }
  $("theme").firstElementChild.textContent = theme;
  live.recolor();
}

$("theme").firstElementChild.textContent = document.documentElement.dataset.theme ?? "auto";
$("theme").addEventListener("click", () => {
  const now = THEMES.indexOf(document.documentElement.dataset.theme ?? "auto");
  chooseTheme(THEMES[(now + 1) % THEMES.length]);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => live.recolor());
$("key-open").addEventListener("click", () => {
  $("key").hidden = !$("key").hidden;
  if (!$("key").hidden) $("key-value").focus();
});
$("key").addEventListener("submit", async (event) => {
  event.preventDefault();
  api.key.set($("key-value").value.trim());
  $("key-value").value = "";
  $("key").hidden = true;
  await start();
  if ($("key").hidden) say("The key is accepted.");
});
$("key-forget").addEventListener("click", () => {
  api.key.set("");
  $("key").hidden = true;
  say("The key is forgotten.");
});

start();
api.version().then((found) => ($("version").textContent = `drex ${found}`), () => {});
