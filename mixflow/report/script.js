"use strict";
const root = document.documentElement;
const panel = document.getElementById("panel");
const body = document.getElementById("panel-body");
const tip = document.getElementById("tip");
let opener = null;

// --- light, dark, or as the system has it
const themes = ["system", "light", "dark"];
const words = { system: "◐ Auto", light: "☀ Light", dark: "☾ Dark" };
const button = document.getElementById("theme");
function kept() {
  try { return localStorage.getItem("theme"); } catch { return null; } // some browsers refuse it to files
}
function show(theme) {
  if (theme === "system") root.removeAttribute("data-theme"); else root.dataset.theme = theme;
  button.textContent = words[theme];
  button.title = button.ariaLabel = "Colours: " + theme;
  button.dataset.theme = theme;
}
show(themes.includes(kept()) ? kept() : "system");
button.hidden = false;
button.addEventListener("click", () => {
  const next = themes[(themes.indexOf(button.dataset.theme) + 1) % themes.length];
  show(next);
  try { localStorage.setItem("theme", next); } catch { /* it holds for this visit */ }
});

// --- where a number comes from
function element(name, text) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  return made;
}
function list(facts) {
  const dl = element("dl");
  for (const [term, text] of facts) {
    const pair = element("div");
    pair.append(element("dt", term), element("dd", text));
    dl.append(pair);
  }
  return dl;
}
function record(key, open) {
  const source = document.getElementById(key);
  const details = element("details");
  details.open = open;
  details.append(element("summary", source.querySelector("h3").textContent));
  details.append(source.querySelector("dl").cloneNode(true));
  return details;
}
function open(number) {
  const keys = number.dataset.sources.split(" ");
  const facts = JSON.parse(number.dataset.facts);
  document.getElementById("panel-title").textContent = number.dataset.name;
  body.replaceChildren(...(facts.length ? [list(facts)] : []), ...keys.map((key, index) => record(key, index === 0)));
  if (opener) opener.classList.remove("open");
  opener = number;
  opener.classList.add("open");
  tip.hidden = true;
  const at = number.getBoundingClientRect();
  panel.classList.toggle("left", at.left + at.right > root.clientWidth); // beside the number, not over it
  panel.hidden = false;
  panel.scrollTop = 0;
  const sheet = panel.getBoundingClientRect(); // as wide as a phone: the number goes above it
  if (sheet.width === root.clientWidth && at.bottom > sheet.top) scrollBy(0, at.bottom - sheet.top + 24);
  panel.focus({ preventScroll: true });
}
function close() {
  panel.hidden = true;
  if (!opener) return;
  opener.classList.remove("open");
  opener.focus({ preventScroll: true });
  opener = null;
}
document.getElementById("close").addEventListener("click", close);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !panel.hidden) close();
  if (event.key === "Escape") tip.hidden = true;
});
document.addEventListener("click", (event) => {
  const number = event.target.closest("a.number");
  if (number) {
    event.preventDefault();
    if (number === opener) close(); else open(number);
    return;
  }
  const link = event.target.closest("a[href^='#']");
  if (link) { // into records that are folded away
    const target = document.getElementById(link.hash.slice(1));
    const fold = target && target.closest("details");
    if (fold) fold.open = true;
    if (panel.contains(link)) close();
  } else if (!panel.hidden && !panel.contains(event.target)) {
    close();
  }
});

// --- in short, while the mouse rests on it
document.addEventListener("mouseover", (event) => {
  const number = event.target.closest("a.number");
  if (!number || number === opener) { tip.hidden = true; return; }
  tip.textContent = document.getElementById(number.dataset.sources.split(" ")[0]).dataset.brief;
  tip.hidden = false;
  const at = number.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, at.right - size.width), root.clientWidth - size.width - 8);
  const above = at.top - size.height - 6;
  tip.style.left = left + "px";
  tip.style.top = (above > 4 ? above : at.bottom + 6) + "px";
});
document.addEventListener("scroll", () => { tip.hidden = true; }, { capture: true, passive: true });

// --- on paper nothing can be unfolded
let unfolded = [];
addEventListener("beforeprint", () => {
  unfolded = [...document.querySelectorAll("section.table details:not([open])")];
  for (const details of unfolded) details.open = true;
});
addEventListener("afterprint", () => { for (const details of unfolded) details.open = false; });
