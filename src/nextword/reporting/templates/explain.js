// The views of an explained text. All of them show the selected token, layer and head. Texts are only ever inserted as text
// nodes; the page's content security policy forbids anything else.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const selected = { token: data.tokens.length - 1, layer: data.layer, head: data.head };
const T = data.tokens.length;

// ---------------------------------------------------------------- elements and text

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

/** Control characters as visible symbols, line breaks and tabs as arrows, a combining mark without a letter on a dotted circle. */
const visible = (text) =>
  text.replace(/^( *)(?=\p{M})/u, "$1◌").replace(/[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g, (c) =>
    c === "\n" ? "↵" : c === "\t" ? "⇥" : c === "\x7f" ? "␡" : c < " " ? String.fromCharCode(0x2400 + c.charCodeAt(0)) : "�");

/** An element with the text of a token, its leading spaces made visible. */
function tokenNode(entry, className = "") {
  const node = element("bdi", className);
  const [text, kind] = entry;
  const spaces = kind === "text" ? text.length - text.trimStart().length : 0;
  if (spaces && !text.slice(0, spaces).includes("\n")) {
    node.append(element("span", "space", "␣".repeat(spaces)), visible(text.slice(spaces)));
    node.firstChild.setAttribute("aria-hidden", text.trim() ? "true" : "false");
  } else node.append(visible(text));
  return node;
}

const tokenText = (i) => data.words[data.tokens[i].word];
const percent = (p) => (p >= 0.9995 && p < 1 ? "> 99.9 %" : p < 0.0005 ? "< 0.1 %" : `${(100 * p).toFixed(1)} %`);
const formatNumber = (x) => (x < 0 ? "−" : "") + Math.abs(x).toFixed(2);
const formatSigned = (x) => (x < 0 ? "" : "+") + formatNumber(x);
const probabilityClass = (p) => (p === null || p >= 0.9 ? "p0" : p >= 0.5 ? "p1" : p >= 0.2 ? "p2" : p >= 0.05 ? "p3" : "p4");
const predictsTokens = data.tokens[0].next !== undefined;

// ---------------------------------------------------------------- attention weights, 16 bits each

const packedWeights = Uint8Array.from(atob(data.attention), (c) => c.charCodeAt(0));
const ROWS = (T * (T + 1)) / 2;

/** Attention weight of query token t on key token k. */
function weight(t, k, layer = selected.layer, head = selected.head) {
  if (k > t) return 0;
  const place = 2 * ((layer * data.model.heads + head) * ROWS + (t * (t + 1)) / 2 + k);
  return (packedWeights[place] + 256 * packedWeights[place + 1]) / 65535;
}

const mean = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;

/** Mean weights on the previous token, the first token and the token itself; the first two positions are left out. */
function describeHead() {
  if (T < 3) return "";
  const rows = Array.from({ length: T - 2 }, (_, i) => i + 2);
  const shares = [(t) => weight(t, t - 1), (t) => weight(t, 0), (t) => weight(t, t)].map((share) => mean(rows.map(share)));
  const [previous, first, self] = shares.map((share) => `${(100 * share).toFixed(0)} %`);
  return `Mean attention of this head: ${previous} to the previous token, ${first} to the first token, ${self} to the token itself.`;
}

// ---------------------------------------------------------------- colours of the page, for the canvases

const probe = document.body.appendChild(element("span", "visually-hidden"));
probe.setAttribute("aria-hidden", "true");

function colour(name) {
  probe.style.color = `var(--${name})`;
  const canvas = new OffscreenCanvas(1, 1).getContext("2d");
  canvas.fillStyle = getComputedStyle(probe).color;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
}

const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;

/** The weights of a head as an image of T × T pixels. The shade is weight ** 0.6, so that small weights are visible. */
function headImage(layer, head, from, to) {
  const image = new ImageData(T, T);
  for (let t = 0; t < T; t++) {
    for (let k = 0; k <= t; k++) {
      const share = weight(t, k, layer, head) ** 0.6;
      const place = 4 * (t * T + k);
      for (let c = 0; c < 3; c++) image.data[place + c] = from[c] + share * (to[c] - from[c]);
      image.data[place + 3] = 255;
    }
  }
  const canvas = new OffscreenCanvas(T, T);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** Set a canvas to a size in CSS pixels, sharp on every screen; its context. */
function prepareCanvas(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.imageSmoothingEnabled = false;
  return context;
}

const heat = { left: 0, top: 0, cell: 1 };
const MAX_LABELS = 40; // tokens up to which the axes are labeled

function drawHeat() {
  const box = $("heatmap").parentElement.clientWidth;
  const labeled = T <= MAX_LABELS && box / T > 13;
  const context = prepareCanvas($("heatmap"), 1, 1);
  context.font = "12px ui-monospace, monospace";
  const texts = data.tokens.map((_, i) => visible(tokenText(i)[0].trim() || tokenText(i)[0].replaceAll(" ", "␣")).slice(0, 14));
  const room = labeled ? Math.ceil(Math.max(...texts.map((text) => context.measureText(text).width))) + 10 : 6;
  const cell = Math.min(40, (box - room - 2) / T);
  Object.assign(heat, { left: room, top: room, cell });
  const side = room + cell * T + 2;
  const canvas = prepareCanvas($("heatmap"), side, side);
  const [sheet, accent, ink, soft, line] = ["sheet", "accent", "ink", "soft", "line"].map(colour);
  canvas.drawImage(headImage(selected.layer, selected.head, sheet, accent), room, room, cell * T, cell * T);
  canvas.strokeStyle = css(line);
  canvas.lineWidth = 1;
  if (cell > 9) {
    for (let i = 0; i <= T; i++) {
      canvas.beginPath();
      canvas.moveTo(room, room + i * cell);
      canvas.lineTo(room + Math.min(T, i + 1) * cell, room + i * cell);
      canvas.moveTo(room + i * cell, room + Math.max(0, i - 1) * cell);
      canvas.lineTo(room + i * cell, room + T * cell);
      canvas.stroke();
    }
  } else canvas.strokeRect(room, room, cell * T, cell * T);
  canvas.strokeStyle = css(accent);
  canvas.lineWidth = 2;
  canvas.strokeRect(room - 1, room + selected.token * cell - 1, cell * (selected.token + 1) + 2, cell + 2);
  if (!labeled) return;
  canvas.font = "12px ui-monospace, monospace";
  canvas.textBaseline = "middle";
  texts.forEach((text, i) => {
    canvas.fillStyle = css(i === selected.token ? ink : soft);
    canvas.textAlign = "right";
    canvas.fillText(text, room - 6, room + (i + 0.5) * cell);
    canvas.save();
    canvas.translate(room + (i + 0.5) * cell, room - 6);
    canvas.rotate(-Math.PI / 2);
    canvas.textAlign = "left";
    canvas.fillText(text, 0, 0);
    canvas.restore();
  });
}

const overview = { side: 1, gap: 6 };

function drawHeads() {
  if (!$("heads-box").open) return;
  const { layers, heads } = data.model;
  const [sheet, accent, line] = ["sheet", "accent", "line"].map(colour);
  const side = Math.max(10, Math.min(96, $("heads").parentElement.clientWidth / heads - overview.gap));
  overview.side = side;
  const canvas = prepareCanvas($("heads"), heads * (side + overview.gap), layers * (side + overview.gap));
  for (let layer = 0; layer < layers; layer++) {
    for (let head = 0; head < heads; head++) {
      const [x, y] = [head * (side + overview.gap) + 2, layer * (side + overview.gap) + 2];
      const isSelected = layer === selected.layer && head === selected.head;
      canvas.drawImage(headImage(layer, head, sheet, accent), x, y, side, side);
      canvas.strokeStyle = css(isSelected ? accent : line);
      canvas.lineWidth = isSelected ? 2.5 : 1;
      canvas.strokeRect(x, y, side, side);
    }
  }
}

// ---------------------------------------------------------------- the text and the selected token

function makeStrip() {
  const strip = $("strip");
  strip.dir = data.direction;
  data.tokens.forEach((token, i) => {
    const [text, kind] = tokenText(i);
    const shown = kind === "text" ? visible(text.replace(/^ +(?=\S)/, "")).replaceAll(/^ +$/g, (s) => "␣".repeat(s.length)) : text;
    const button = element("button", `token ${probabilityClass(token.probability ?? null)}`, element("span", `word ${kind}`, element("bdi", "plain", shown)));
    button.type = "button";
    if (kind === "text" && text.startsWith(" ")) button.classList.add("apart");
    if (kind === "marker" || (i && tokenText(i - 1)[1] === "marker")) button.classList.add("apart");
    if (predictsTokens) {
      const bits = element("span", "bits", token.surprisal == null ? "–" : token.surprisal.toFixed(1));
      bits.append(element("span", "visually-hidden", token.surprisal == null ? " not predicted" : " bits"));
      button.append(bits);
    }
    button.addEventListener("click", () => select({ token: i }));
    strip.append(button);
  });
  if (!predictsTokens) for (const id of ["text-intro", "legend"]) $(id).hidden = true;
  if (!predictsTokens) document.querySelector("section .equation").hidden = true;
}

function showSelected() {
  [...$("strip").children].forEach((button, i) => {
    button.tabIndex = i === selected.token ? 0 : -1;
    if (i === selected.token) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  });
  $("selected").replaceChildren(`Token ${selected.token + 1} of ${T}: `, tokenNode(tokenText(selected.token)));
  $("previous-token").disabled = selected.token === 0;
  $("next-token").disabled = selected.token === T - 1;
}

// ---------------------------------------------------------------- next-token probabilities

function bar(share, className = "bar") {
  const span = element("span", className);
  span.style.width = `${100 * share}%`; // set by script: the content security policy forbids style attributes
  return span;
}

function row(cells, className) {
  const tr = element("tr", className, ...cells);
  if (tr.firstChild.tagName === "TH") tr.firstChild.scope = "row";
  return tr;
}

function showNext() {
  $("next").hidden = !predictsTokens;
  if (!predictsTokens) return;
  const follows = data.tokens[selected.token + 1];
  const candidates = data.tokens[selected.token].next;
  $("candidates").tBodies[0].replaceChildren(...candidates.map(([id, p]) => {
    const isActual = follows !== undefined && id === follows.word;
    return row([element("th", "", tokenNode(data.words[id])), element("td", "", bar(p)), element("td", "", percent(p))], isActual ? "actual" : "");
  }));
  if (follows === undefined) $("actual").textContent = "The text ends here: these are the predictions for its continuation.";
  else if (follows.surprisal == null) $("actual").replaceChildren("The task template continues with the special token ", tokenNode(tokenText(selected.token + 1)), ".");
  else {
    $("actual").replaceChildren("Actual next token: ", tokenNode(tokenText(selected.token + 1)),
      `: ${percent(follows.probability)}, rank ${follows.rank.toLocaleString("en")}, ${follows.surprisal.toFixed(1)} bits.`);
  }
}

// ---------------------------------------------------------------- attention

function makeLines() {
  const sides = [element("ol"), element("ol")];
  data.tokens.forEach((_, i) => {
    for (const [side, list] of sides.entries()) {
      const item = element("li", "", tokenNode(tokenText(i)));
      if (side) item.append(element("span", "weight"));
      else {
        item.addEventListener("click", () => select({ token: i }));
        item.addEventListener("pointerenter", ({ pointerType }) => pointerType === "mouse" && drawLines(i));
      }
      list.append(item);
    }
  });
  sides[0].addEventListener("pointerleave", () => drawLines());
  $("attention-lines").before(sides[0]);
  $("attention-lines").after(sides[1]);
}

function drawLines(token = selected.token) {
  const [left, right] = $("lines").querySelectorAll("ol");
  const svg = $("attention-lines");
  const middle = (node) => node.offsetTop + node.offsetHeight / 2;
  const [x, width] = [left.offsetLeft + left.offsetWidth, right.offsetLeft - left.offsetLeft - left.offsetWidth];
  Object.assign(svg.style, { left: `${x}px`, top: "0", width: `${width}px`, height: `${left.offsetHeight}px` });
  svg.replaceChildren();
  const from = middle(left.children[token]);
  [...right.children].forEach((item, k) => {
    const share = weight(token, k);
    left.children[k].className = k === selected.token ? "selected" : "";
    item.className = k > token ? "later" : "";
    item.style.backgroundColor = k > token ? "" : `color-mix(in srgb, var(--accent) ${(40 * share ** 0.6).toFixed(1)}%, transparent)`;
    item.lastChild.textContent = k > token ? "" : percent(share);
    if (share < 0.004) return;
    const path = document.createElementNS(svg.namespaceURI, "path");
    const to = middle(item);
    path.setAttribute("d", `M0 ${from}C${width / 2} ${from} ${width / 2} ${to} ${width} ${to}`);
    Object.assign(path.style, { fill: "none", stroke: "var(--accent)", strokeWidth: 0.7 + 5 * share, opacity: 0.2 + 0.8 * share ** 0.6 });
    svg.append(path);
  });
  const [box, row] = [$("lines"), left.children[token]];
  if (token === selected.token && box.scrollHeight > box.clientHeight) box.scrollTop = row.offsetTop - box.clientHeight / 2;
}

/** The largest weights of the selected token as a sentence and all of them as a table. */
function showAttentionSummary() {
  const shares = data.tokens.map((_, k) => [k, weight(selected.token, k)]).slice(0, selected.token + 1);
  const largest = [...shares].sort((a, b) => b[1] - a[1]).slice(0, 3);
  const listed = largest.flatMap(([k, share], i) => [
    i ? ", " : "", ...(k === selected.token ? ["itself"] : [tokenNode(tokenText(k))]), ` ${percent(share)}`,
  ]);
  $("attention-summary").replaceChildren(`Layer ${selected.layer + 1}, head ${selected.head + 1}: `, tokenNode(tokenText(selected.token)), " attends to ", ...listed, ".");
  $("head-pattern").textContent = describeHead();
  const table = $("weights");
  table.caption.replaceChildren(`Attention of token ${selected.token + 1}, layer ${selected.layer + 1}, head ${selected.head + 1}`);
  table.tBodies[0].replaceChildren(...shares.map(([k, share]) =>
    row([element("th", "", `${k + 1} `, tokenNode(tokenText(k))), element("td", "", percent(share))])));
}

function showAttention() {
  $("layer").value = selected.layer;
  $("head").value = selected.head;
  showAttentionSummary();
  drawHeat();
  drawLines();
  drawHeads();
}

// ---------------------------------------------------------------- layers

const layerName = (layer) => (layer === 0 ? "embedding" : `layer ${layer}`);

function makeLayers() {
  if (predictsTokens) {
    const head = element("tr", "", element("td"));
    data.tokens.forEach((_, i) => {
      const th = element("th", "", tokenNode(tokenText(i)));
      th.scope = "col";
      head.append(th);
    });
    $("layers").tHead.append(head);
    data.layers.forEach((layer, number) => {
      const cells = layer.predictions.map(([id, p], i) => {
        const isActual = data.tokens[i + 1]?.word === id && data.tokens[i + 1].surprisal != null;
        const cell = element("td", "", element("span", "", tokenNode(data.words[id]), isActual ? " ✓" : ""), element("small", "", percent(p)));
        cell.style.setProperty("--p", p);
        cell.addEventListener("click", () => select({ token: i }));
        return cell;
      });
      $("layers").tBodies[0].append(row([element("th", "", layerName(number)), ...cells]));
    });
  } else $("layers-scroll").hidden = true;
  if (!data.layers[0].outputs) return;
  const names = Object.keys(data.layers[0].outputs);
  $("outputs").hidden = false;
  $("outputs").tHead.append(element("tr", "", element("td"), ...names.map((name) => Object.assign(element("th", "", visible(name)), { scope: "col" }))));
  data.layers.forEach((layer, number) => {
    const cells = names.map((name) => element("td", "", data.hasProbabilities ? percent(layer.outputs[name]) : layer.outputs[name].toFixed(2)));
    $("outputs").tBodies[0].append(row([element("th", "", layerName(number)), ...cells]));
  });
}

function showLayers() {
  if (!predictsTokens) return;
  for (const tr of $("layers").rows) {
    [...tr.cells].forEach((cell, i) => cell.classList.toggle("selected", i === selected.token + 1));
  }
  const [box, cell] = [$("layers-scroll"), $("layers").rows[0].cells[selected.token + 1]];
  box.scrollLeft = cell.offsetLeft - box.clientWidth / 2 + cell.offsetWidth / 2;
}

// ---------------------------------------------------------------- token attributions

const MAX_ROWS = 24; // of the first table; of a longer text it holds the largest attributions

function makeAttributions() {
  const { parts: values, output, at_baseline, difference, relative_error, steps, unit } = data.attribution;
  const maximum = Math.max(...values.map(Math.abs), 1e-9);
  $("attribution-strip").dir = data.direction;
  values.forEach((value, i) => {
    const [text, kind] = tokenText(i);
    const shown = kind === "text" ? visible(text.replace(/^ +(?=\S)/, "")).replaceAll(/^ +$/g, (s) => "␣".repeat(s.length)) : text;
    const token = element("span", "token", element("span", `word ${kind}`, element("bdi", "plain", shown)));
    if ((kind === "text" && text.startsWith(" ")) || kind === "marker" || (i && tokenText(i - 1)[1] === "marker")) token.classList.add("apart");
    const name = value < 0 ? "warm" : "accent";
    token.style.backgroundColor = `color-mix(in srgb, var(--${name}) ${(48 * Math.abs(value) / maximum).toFixed(1)}%, transparent)`;
    $("attribution-strip").append(token);
  });
  const low = Math.min(0, ...values);
  const span = Math.max(0, ...values) - low || 1;
  const lines = values.map((value, i) => {
    const strip = element("span", value < 0 ? "negative" : "");
    Object.assign(strip.style, { insetInlineStart: `${(100 * (Math.min(0, value) - low)) / span}%`, width: `${(100 * Math.abs(value)) / span}%` });
    const axis = element("td", "axis", strip);
    axis.style.setProperty("--zero", `${(-100 * low) / span}%`);
    return () => row([element("th", "", tokenNode(tokenText(i))), axis.cloneNode(true), element("td", "", formatSigned(value))]);
  });
  const largest = values.map((value, i) => [Math.abs(value), i]).sort((a, b) => b[0] - a[0]).slice(0, MAX_ROWS).map(([, i]) => i);
  $("attributions").caption.textContent = T > MAX_ROWS ? `The ${MAX_ROWS} largest attributions, in ${unit}` : `Attribution of every token, in ${unit}`;
  $("attributions").tBodies[0].append(...lines.filter((_, i) => largest.includes(i)).map((line) => line()));
  $("all-attributions-box").hidden = T <= MAX_ROWS;
  if (T > MAX_ROWS) $("all-attributions").tBodies[0].append(...lines.map((line) => line()));
  const sum = values.reduce((total, value) => total + value, 0);
  const error = `${(100 * relative_error).toFixed(relative_error < 0.001 ? 3 : 2)} %`;
  $("completeness").textContent =
    `Completeness: the attributions sum to ${formatSigned(sum)}. The output of the text (${formatNumber(output)}) minus that of the baseline ` +
    `(${formatNumber(at_baseline)}) is ${formatSigned(difference)}. Relative error with ${steps} integration steps: ${error}` +
    (relative_error < 0.01 ? "." : ". Above 1 %: interpret the attributions with care.");
}

// ---------------------------------------------------------------- selection

function select(change) {
  const before = { ...selected };
  const within = (value, size) => Math.max(0, Math.min(size - 1, value));
  Object.assign(selected, change);
  selected.token = within(selected.token, T);
  selected.layer = within(selected.layer, data.model.layers);
  selected.head = within(selected.head, data.model.heads);
  if (selected.token !== before.token) {
    showSelected();
    showNext();
    showLayers();
  }
  showAttention();
}

function handleKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const ahead = data.direction === "rtl" && event.currentTarget === $("strip") ? -1 : 1;
  const { key, shiftKey } = event;
  const step = { ArrowUp: -1, ArrowDown: 1 }[key];
  const move = { ArrowRight: selected.token + ahead, ArrowLeft: selected.token - ahead, Home: 0, End: T - 1 }[key];
  if (step) select(shiftKey ? { head: selected.head + step } : { layer: selected.layer + step });
  else if (move !== undefined) select({ token: move });
  else return;
  event.preventDefault();
  if (event.currentTarget === $("strip")) $("strip").children[selected.token].focus();
}

function cellAt(canvas, event, left, top, cell) {
  const box = canvas.getBoundingClientRect();
  return [Math.floor((event.clientX - box.left - left) / cell), Math.floor((event.clientY - box.top - top) / cell)];
}

function addListeners() {
  for (const id of ["strip", "lines"]) $(id).addEventListener("keydown", handleKey);
  $("previous-token").addEventListener("click", () => select({ token: selected.token - 1 }));
  $("next-token").addEventListener("click", () => select({ token: selected.token + 1 }));
  for (const name of ["layer", "head"]) {
    for (let i = 0; i < data.model[`${name}s`]; i++) $(name).append(new Option(String(i + 1), String(i)));
    $(name).addEventListener("change", ({ target }) => select({ [name]: Number(target.value) }));
  }
  $("heatmap").addEventListener("click", (event) => {
    const [, token] = cellAt($("heatmap"), event, heat.left, heat.top, heat.cell);
    if (token >= 0 && token < T) select({ token });
  });
  $("heatmap").addEventListener("pointermove", (event) => {
    const [k, t] = cellAt($("heatmap"), event, heat.left, heat.top, heat.cell);
    const inside = t >= 0 && t < T && k >= 0 && k <= t;
    $("heatmap").title = inside ? `${visible(tokenText(t)[0]).trim()} → ${visible(tokenText(k)[0]).trim()}: ${percent(weight(t, k))}` : "";
  });
  $("heads").addEventListener("click", (event) => {
    const [head, layer] = cellAt($("heads"), event, 0, 0, overview.side + overview.gap);
    select({ head, layer });
  });
  $("heads-box").addEventListener("toggle", drawHeads);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showAttention);
  let width = innerWidth;
  addEventListener("resize", () => innerWidth !== width && (width = innerWidth) && showAttention());
}

makeStrip();
makeLines();
makeLayers();
makeAttributions();
addListeners();
showSelected();
showNext();
showLayers();
showAttention();
