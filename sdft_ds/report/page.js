// What the pointer and the keyboard show: the values under a chart's crosshair, both sides' most likely tokens, and
// the settings that match a word. Text is set as text, never as HTML.
"use strict";

const tip = document.getElementById("tip");

function make(tag, style, text) {
  const node = document.createElement(tag);
  if (style) node.className = style;
  if (text !== undefined) node.textContent = text;
  return node;
}

function show(nodes, x, y) { // beside a place on the screen, within its edges
  tip.replaceChildren(...nodes);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const right = document.documentElement.clientWidth - width - 8;
  const above = y - height - 12;
  tip.style.left = `${scrollX + Math.max(8, Math.min(x + 14, right))}px`;
  tip.style.top = `${scrollY + (above > 8 ? above : y + 24)}px`;
}

const hide = () => { tip.hidden = true; };

function digits(value) {
  if (typeof value !== "number") return value;
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

// Charts.

for (const svg of document.querySelectorAll("svg[data-hover]")) {
  const { axes, log, stacked, series } = JSON.parse(svg.dataset.hover);
  const [xLow, xHigh, left, right] = axes.x;
  const [yLow, yHigh, bottom, top] = axes.y;
  const scale = log ? Math.log10 : Number;
  const pixelX = (x) => left + (x - xLow) / (xHigh - xLow) * (right - left);
  const pixelY = (y) => bottom + (scale(y) - scale(yLow)) / (scale(yHigh) - scale(yLow)) * (top - bottom);
  const hair = document.createElementNS("http://www.w3.org/2000/svg", "g");
  hair.setAttribute("class", "hair");
  svg.append(hair);
  let at = xHigh;

  function draw(tag, attributes) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    hair.append(node);
  }

  function nearest(xs, x) {
    let low = 0, high = xs.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - xs[low - 1] < xs[low] - x ? low - 1 : low;
  }

  function point(x) { // put the crosshair on the nearest logged step
    const found = series.map((s) => nearest(s.x, x));
    const steps = series.map((s, k) => s.x[found[k]]);
    at = steps.reduce((best, step) => Math.abs(step - x) < Math.abs(best - x) ? step : best);
    hair.replaceChildren();
    draw("line", { x1: pixelX(at), x2: pixelX(at), y1: top, y2: bottom });
    const table = make("table");
    let sum = 0;
    series.forEach((s, k) => {
      const value = s.y[found[k]];
      const row = make("tr", s.colour), name = make("td");
      name.append(make("span", "key"), s.name);
      row.append(name, make("td", "p", digits(value) + (steps[k] === at ? "" : ` (${steps[k]})`)));
      table.append(row);
      if (typeof value !== "number") return;
      sum += value;
      draw("circle", { class: s.colour, cx: pixelX(steps[k]), cy: pixelY(stacked ? sum : value), r: 3.5 });
    });
    if (stacked) {
      const row = make("tr");
      row.append(make("td", "", "sum"), make("td", "p", digits(sum)));
      table.append(row);
    }
    const box = svg.getBoundingClientRect();
    show([make("p", "", `step ${at.toLocaleString("en")}`), table],
      box.left + pixelX(at) * box.width / svg.viewBox.baseVal.width, box.top + 40);
  }

  const leave = () => { hair.replaceChildren(); hide(); };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const pixel = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    point(xLow + (pixel - left) / (right - left) * (xHigh - xLow));
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) point(at); });
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const steps = series[0].x;
    point(steps[Math.max(0, Math.min(steps.length - 1, nearest(steps, at) + move))]);
  });
}

// Tokens.

const visible = (text) => text === "" ? "∅" : text.replaceAll("\n", "⏎").replaceAll(" ", "␣").replaceAll("\t", "⇥");

function bar(side, p) {
  const track = make("td", `track ${side}`);
  if (p !== undefined) {
    const fill = make("div", "fill");
    fill.style.width = `${100 * p}%`;
    track.append(fill);
  }
  const share = p === undefined ? "–" : p > 0 && p < 0.001 ? "<0.1 %" : `${(100 * p).toFixed(1)} %`;
  return [track, make("td", "p", share)];
}

function showToken(node) {
  const box = node.parentElement;
  box.tops ??= JSON.parse(box.nextElementSibling.textContent);
  const place = [...box.children].indexOf(node);
  const [divergence, taken, ...tops] = box.tops.tokens[place];
  const sides = tops.map((flat) => { // [word, p, word, p, ...], p in ten-thousandths
    const side = new Map();
    for (let k = 0; k < flat.length; k += 2) side.set(flat[k], flat[k + 1] / 10000);
    return side;
  });
  const [student, teacher] = sides;
  const most = (word) => Math.max(student.get(word) ?? 0, teacher.get(word) ?? 0);
  const words = [...new Set([...teacher.keys(), ...student.keys()])].sort((a, b) => most(b) - most(a));
  const table = make("table"), head = make("tr");
  head.append(make("td"), make("td", "", "student"), make("td"), make("td", "", "teacher"), make("td"));
  table.append(head);
  for (const word of words) {
    const row = make("tr", word === taken ? "taken" : "");
    row.append(make("td", "word", visible(box.tops.words[word])));
    row.append(...bar("c1", student.get(word)), ...bar("c0", teacher.get(word)));
    table.append(row);
  }
  const said = divergence === null ? "not in the loss" : `${digits(divergence)} nats`;
  const { left, top } = node.getClientRects()[0];
  show([make("p", "", `${place + 1}: ${visible(box.tops.words[taken])} · ${said}`), table], left, top);
}

const tokenOf = (event) => event.target.closest(".tokens i");

for (const name of ["pointerover", "focusin"]) {
  document.addEventListener(name, (event) => { if (tokenOf(event)) showToken(tokenOf(event)); });
}
for (const name of ["pointerout", "focusout"]) {
  document.addEventListener(name, (event) => { if (tokenOf(event)) hide(); });
}
document.addEventListener("click", (event) => tokenOf(event)?.focus());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide();
  const node = tokenOf(event);
  const next = { ArrowLeft: node?.previousElementSibling, ArrowRight: node?.nextElementSibling }[event.key];
  if (!next) return;
  event.preventDefault();
  node.tabIndex = -1; // one stop of the tab key for a completion, wherever the arrows went
  next.tabIndex = 0;
  next.focus();
});

// Settings.

for (const input of document.querySelectorAll("input[type=search]")) {
  input.addEventListener("input", () => {
    for (const row of input.nextElementSibling.querySelectorAll("tbody tr")) {
      row.hidden = !row.textContent.toLowerCase().includes(input.value.toLowerCase());
    }
  });
}
