// The views of a text that was explained. All of them follow one chosen token, one layer and one head. Texts are only ever set
// as text: nothing here, and no policy of the page, lets one become markup.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const at = { token: data.tokens.length - 1, layer: data.layer, head: data.head };
const T = data.tokens.length;

// ---------------------------------------------------------------- elements and texts

function made(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

/** Control characters by their pictures, line ends and tabs by arrows, so that nothing hides. */
const visible = (text) =>
  text.replace(/[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g, (c) =>
    c === "\n" ? "↵" : c === "\t" ? "⇥" : c === "\x7f" ? "␡" : c < " " ? String.fromCharCode(0x2400 + c.charCodeAt(0)) : "�");

/** A token's text with its spaces to be seen; what is not a word of the text in another script. */
function named(word, className = "") {
  const node = made("bdi", className);
  const [text, kind] = word;
  const spaces = kind === "text" ? text.length - text.trimStart().length : 0;
  if (spaces && !text.slice(0, spaces).includes("\n")) {
    node.append(made("span", "space", "␣".repeat(spaces)), visible(text.slice(spaces)));
    node.firstChild.setAttribute("aria-hidden", text.trim() ? "true" : "false");
  } else node.append(visible(text));
  return node;
}

const word = (i) => data.words[data.tokens[i].word];
const percent = (p) => (p >= 0.9995 && p < 1 ? "> 99.9 %" : p < 0.0005 ? "< 0.1 %" : `${(100 * p).toFixed(1)} %`);
const plainly = (x) => (x < 0 ? "−" : "") + Math.abs(x).toFixed(2);
const signed = (x) => (x < 0 ? "" : "+") + plainly(x);
const nth = (n) => `${n.toLocaleString("en")}${n % 100 > 10 && n % 100 < 14 ? "th" : ["th", "st", "nd", "rd"][n % 10] ?? "th"}`;
const band = (p) => (p === null || p >= 0.9 ? "p0" : p >= 0.5 ? "p1" : p >= 0.2 ? "p2" : p >= 0.05 ? "p3" : "p4");
const speaks = data.tokens[0].next !== undefined;

// ---------------------------------------------------------------- attention, packed as two bytes a weight

const packed = Uint8Array.from(atob(data.attention), (c) => c.charCodeAt(0));
const ROWS = (T * (T + 1)) / 2;

/** How much token t takes from token k, in a layer and head. */
function weight(t, k, layer = at.layer, head = at.head) {
  if (k > t) return 0;
  const place = 2 * ((layer * data.about.heads + head) * ROWS + (t * (t + 1)) / 2 + k);
  return (packed[place] + 256 * packed[place + 1]) / 65535;
}

const mean = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;

/** What kind of head it is, by the shares of its weight; positions without a choice are left out. */
function kindOf() {
  if (T < 3) return "";
  const rows = Array.from({ length: T - 2 }, (_, i) => i + 2);
  const shares = [(t) => weight(t, t - 1), (t) => weight(t, 0), (t) => weight(t, t)].map((share) => mean(rows.map(share)));
  const [before, first, itself] = shares.map((share) => `${(100 * share).toFixed(0)} %`);
  return `Over the whole text this head gives ${before} of its weight to the token before, ${first} to the first token and ${itself} to the token itself.`;
}

// ---------------------------------------------------------------- colours of the page, for what is drawn

const probe = document.body.appendChild(made("span", "unseen"));
probe.setAttribute("aria-hidden", "true");

function colour(name) {
  probe.style.color = `var(--${name})`;
  const canvas = new OffscreenCanvas(1, 1).getContext("2d");
  canvas.fillStyle = getComputedStyle(probe).color;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
}

const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;

/** One head as a picture of T × T points; a weight's shade is its power 0.6, so that small ones are seen. */
function picture(layer, head, from, to) {
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

/** A canvas of so many points of the page, sharp on every screen. */
function prepared(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.imageSmoothingEnabled = false;
  return context;
}

const heat = { left: 0, top: 0, cell: 1 };
const LABELLED = 40; // tokens whose names there is room for

function drawHeat() {
  const box = $("heat").parentElement.clientWidth;
  const labelled = T <= LABELLED && box / T > 13;
  const context = prepared($("heat"), 1, 1);
  context.font = "12px ui-monospace, monospace";
  const texts = data.tokens.map((_, i) => visible(word(i)[0].trim() || word(i)[0].replaceAll(" ", "␣")).slice(0, 14));
  const room = labelled ? Math.ceil(Math.max(...texts.map((text) => context.measureText(text).width))) + 10 : 6;
  const cell = Math.min(40, (box - room - 2) / T);
  Object.assign(heat, { left: room, top: room, cell });
  const side = room + cell * T + 2;
  const canvas = prepared($("heat"), side, side);
  const [sheet, accent, ink, soft, line] = ["sheet", "accent", "ink", "soft", "line"].map(colour);
  canvas.drawImage(picture(at.layer, at.head, sheet, accent), room, room, cell * T, cell * T);
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
  canvas.strokeRect(room - 1, room + at.token * cell - 1, cell * (at.token + 1) + 2, cell + 2);
  if (!labelled) return;
  canvas.font = "12px ui-monospace, monospace";
  canvas.textBaseline = "middle";
  texts.forEach((text, i) => {
    canvas.fillStyle = css(i === at.token ? ink : soft);
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
  const { layers, heads } = data.about;
  const [sheet, accent, line] = ["sheet", "accent", "line"].map(colour);
  const side = Math.max(10, Math.min(96, $("heads").parentElement.clientWidth / heads - overview.gap));
  overview.side = side;
  const canvas = prepared($("heads"), heads * (side + overview.gap), layers * (side + overview.gap));
  for (let layer = 0; layer < layers; layer++) {
    for (let head = 0; head < heads; head++) {
      const [x, y] = [head * (side + overview.gap) + 2, layer * (side + overview.gap) + 2];
      const chosen = layer === at.layer && head === at.head;
      canvas.drawImage(picture(layer, head, sheet, accent), x, y, side, side);
      canvas.strokeStyle = css(chosen ? accent : line);
      canvas.lineWidth = chosen ? 2.5 : 1;
      canvas.strokeRect(x, y, side, side);
    }
  }
}

// ---------------------------------------------------------------- the text and the chosen token

function makeStrip() {
  const strip = $("strip");
  strip.dir = data.direction;
  data.tokens.forEach((token, i) => {
    const [text, kind] = word(i);
    const shown = kind === "text" ? visible(text.replace(/^ +(?=\S)/, "")).replaceAll(/^ +$/g, (s) => "␣".repeat(s.length)) : text;
    const button = made("button", `token ${band(token.probability ?? null)}`, made("span", `word ${kind}`, made("bdi", "plain", shown)));
    button.type = "button";
    if (kind === "text" && text.startsWith(" ")) button.classList.add("apart");
    if (kind === "marker" || (i && word(i - 1)[1] === "marker")) button.classList.add("apart");
    if (speaks) {
      const bits = made("span", "bits", token.surprisal == null ? "–" : token.surprisal.toFixed(1));
      bits.append(made("span", "unseen", token.surprisal == null ? " not predicted" : " bits"));
      button.append(bits);
    }
    button.addEventListener("click", () => choose({ token: i }));
    strip.append(button);
  });
  if (!speaks) for (const id of ["text-intro", "legend"]) $(id).hidden = true;
  if (!speaks) document.querySelector("section .equation").hidden = true;
}

function showChosen() {
  [...$("strip").children].forEach((button, i) => {
    button.tabIndex = i === at.token ? 0 : -1;
    if (i === at.token) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  });
  $("chosen").replaceChildren(`Token ${at.token + 1} of ${T}: `, named(word(at.token)));
  $("back").disabled = at.token === 0;
  $("on").disabled = at.token === T - 1;
}

// ---------------------------------------------------------------- what comes next

function bar(share, className = "bar") {
  const span = made("span", className);
  span.style.width = `${100 * share}%`; // by script: the page's policy allows no style in markup
  return span;
}

function row(cells, className) {
  const tr = made("tr", className, ...cells);
  if (tr.firstChild.tagName === "TH") tr.firstChild.scope = "row";
  return tr;
}

function showNext() {
  $("next").hidden = !speaks;
  if (!speaks) return;
  const follows = data.tokens[at.token + 1];
  const candidates = data.tokens[at.token].next;
  $("chances").tBodies[0].replaceChildren(...candidates.map(([which, p]) => {
    const taken = follows !== undefined && which === follows.word;
    return row([made("th", "", named(data.words[which])), made("td", "", bar(p)), made("td", "", percent(p))], taken ? "taken" : "");
  }));
  if (follows === undefined) $("really").textContent = "Here the text ends: this is what the model would write next.";
  else if (follows.surprisal == null) $("really").replaceChildren("Here the task's template puts a marker: ", named(word(at.token + 1)), ".");
  else {
    $("really").replaceChildren("What really follows is ", named(word(at.token + 1)),
      `: ${percent(follows.probability)}, the ${nth(follows.rank)} likeliest, ${follows.surprisal.toFixed(1)} bits.`);
  }
}

// ---------------------------------------------------------------- attention

function makeLines() {
  const sides = [made("ol"), made("ol")];
  data.tokens.forEach((_, i) => {
    for (const [side, list] of sides.entries()) {
      const item = made("li", "", named(word(i)));
      if (side) item.append(made("span", "weight"));
      else {
        item.addEventListener("click", () => choose({ token: i }));
        item.addEventListener("pointerenter", ({ pointerType }) => pointerType === "mouse" && drawLines(i));
      }
      list.append(item);
    }
  });
  sides[0].addEventListener("pointerleave", () => drawLines());
  $("rays").before(sides[0]);
  $("rays").after(sides[1]);
}

function drawLines(token = at.token) {
  const [left, right] = $("lines").querySelectorAll("ol");
  const svg = $("rays");
  const middle = (node) => node.offsetTop + node.offsetHeight / 2;
  const [x, width] = [left.offsetLeft + left.offsetWidth, right.offsetLeft - left.offsetLeft - left.offsetWidth];
  Object.assign(svg.style, { left: `${x}px`, top: "0", width: `${width}px`, height: `${left.offsetHeight}px` });
  svg.replaceChildren();
  const from = middle(left.children[token]);
  [...right.children].forEach((item, k) => {
    const share = weight(token, k);
    left.children[k].className = k === at.token ? "chosen" : "";
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
  if (token === at.token && box.scrollHeight > box.clientHeight) box.scrollTop = row.offsetTop - box.clientHeight / 2;
}

/** The strongest weights of the chosen token, in words. */
function showLooks() {
  const shares = data.tokens.map((_, k) => [k, weight(at.token, k)]).slice(0, at.token + 1);
  const strongest = [...shares].sort((a, b) => b[1] - a[1]).slice(0, 3);
  const told = strongest.flatMap(([k, share], i) => [
    i ? ", " : "", ...(k === at.token ? ["itself"] : [named(word(k))]), ` ${percent(share)}`,
  ]);
  $("looks").replaceChildren(`Layer ${at.layer + 1}, head ${at.head + 1}: `, named(word(at.token)), " looks at ", ...told, ".");
  $("kind").textContent = kindOf();
  const table = $("weights");
  table.caption.replaceChildren(`What token ${at.token + 1} looks at in layer ${at.layer + 1}, head ${at.head + 1}`);
  table.tBodies[0].replaceChildren(...shares.map(([k, share]) =>
    row([made("th", "", `${k + 1} `, named(word(k))), made("td", "", percent(share))])));
}

function showAttention() {
  $("layer").value = at.layer;
  $("head").value = at.head;
  showLooks();
  drawHeat();
  drawLines();
  drawHeads();
}

// ---------------------------------------------------------------- layers

const layerName = (layer) => (layer === 0 ? "embedding" : `layer ${layer}`);

function makeLayers() {
  if (speaks) {
    const head = made("tr", "", made("td"));
    data.tokens.forEach((_, i) => {
      const th = made("th", "", named(word(i)));
      th.scope = "col";
      head.append(th);
    });
    $("layers").tHead.append(head);
    data.layers.forEach((layer, number) => {
      const cells = layer.says.map(([which, p], i) => {
        const right = data.tokens[i + 1]?.word === which && data.tokens[i + 1].surprisal != null;
        const cell = made("td", "", made("span", "", named(data.words[which]), right ? " ✓" : ""), made("small", "", percent(p)));
        cell.style.setProperty("--p", p);
        cell.addEventListener("click", () => choose({ token: i }));
        return cell;
      });
      $("layers").tBodies[0].append(row([made("th", "", layerName(number)), ...cells]));
    });
  } else $("layers-scroll").hidden = true;
  if (!data.layers[0].outputs) return;
  const names = Object.keys(data.layers[0].outputs);
  $("outputs").hidden = false;
  $("outputs").tHead.append(made("tr", "", made("td"), ...names.map((name) => Object.assign(made("th", "", visible(name)), { scope: "col" }))));
  data.layers.forEach((layer, number) => {
    const cells = names.map((name) => made("td", "", data.shares ? percent(layer.outputs[name]) : layer.outputs[name].toFixed(2)));
    $("outputs").tBodies[0].append(row([made("th", "", layerName(number)), ...cells]));
  });
}

function showLayers() {
  if (!speaks) return;
  for (const tr of $("layers").rows) {
    [...tr.cells].forEach((cell, i) => cell.classList.toggle("chosen", i === at.token + 1));
  }
  const [box, cell] = [$("layers-scroll"), $("layers").rows[0].cells[at.token + 1]];
  box.scrollLeft = cell.offsetLeft - box.clientWidth / 2 + cell.offsetWidth / 2;
}

// ---------------------------------------------------------------- what the prediction leans on

const FEW = 24; // parts that are shown at once; of more tokens the strongest

function makeParts() {
  const { parts, output, at_baseline, difference, relative_error, steps, unit } = data.leaning;
  const most = Math.max(...parts.map(Math.abs), 1e-9);
  $("parts-strip").dir = data.direction;
  parts.forEach((part, i) => {
    const [text, kind] = word(i);
    const shown = kind === "text" ? visible(text.replace(/^ +(?=\S)/, "")).replaceAll(/^ +$/g, (s) => "␣".repeat(s.length)) : text;
    const token = made("span", "token", made("span", `word ${kind}`, made("bdi", "plain", shown)));
    if ((kind === "text" && text.startsWith(" ")) || kind === "marker" || (i && word(i - 1)[1] === "marker")) token.classList.add("apart");
    const name = part < 0 ? "warm" : "accent";
    token.style.backgroundColor = `color-mix(in srgb, var(--${name}) ${(48 * Math.abs(part) / most).toFixed(1)}%, transparent)`;
    $("parts-strip").append(token);
  });
  const low = Math.min(0, ...parts);
  const span = Math.max(0, ...parts) - low || 1;
  const lines = parts.map((part, i) => {
    const strip = made("span", part < 0 ? "against" : "");
    Object.assign(strip.style, { insetInlineStart: `${(100 * (Math.min(0, part) - low)) / span}%`, width: `${(100 * Math.abs(part)) / span}%` });
    const axis = made("td", "axis", strip);
    axis.style.setProperty("--zero", `${(-100 * low) / span}%`);
    return () => row([made("th", "", named(word(i))), axis.cloneNode(true), made("td", "", signed(part))]);
  });
  const strongest = parts.map((part, i) => [Math.abs(part), i]).sort((a, b) => b[0] - a[0]).slice(0, FEW).map(([, i]) => i);
  $("parts").caption.textContent = T > FEW ? `The ${FEW} strongest parts, in ${unit}` : `Every token's part, in ${unit}`;
  $("parts").tBodies[0].append(...lines.filter((_, i) => strongest.includes(i)).map((line) => line()));
  $("all-parts-box").hidden = T <= FEW;
  if (T > FEW) $("all-parts").tBodies[0].append(...lines.map((line) => line()));
  const sum = parts.reduce((total, part) => total + part, 0);
  const apart = `${(100 * relative_error).toFixed(relative_error < 0.001 ? 3 : 2)} %`;
  $("complete").textContent =
    `The check: the parts must add up to what the text has (${plainly(output)}) less what the average text has ` +
    `(${plainly(at_baseline)}), that is ${signed(difference)}. They add up to ${signed(sum)}: ${apart} apart, by ${steps} points ` +
    (relative_error < 0.01 ? "of the way." : "of the way. That is more than 1 %, so read them with care.");
}

// ---------------------------------------------------------------- choosing

function choose(change) {
  const before = { ...at };
  const within = (value, size) => Math.max(0, Math.min(size - 1, value));
  Object.assign(at, change);
  at.token = within(at.token, T);
  at.layer = within(at.layer, data.about.layers);
  at.head = within(at.head, data.about.heads);
  if (at.token !== before.token) {
    showChosen();
    showNext();
    showLayers();
  }
  showAttention();
}

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const ahead = data.direction === "rtl" && event.currentTarget === $("strip") ? -1 : 1;
  const { key, shiftKey } = event;
  const step = { ArrowUp: -1, ArrowDown: 1 }[key];
  const move = { ArrowRight: at.token + ahead, ArrowLeft: at.token - ahead, Home: 0, End: T - 1 }[key];
  if (step) choose(shiftKey ? { head: at.head + step } : { layer: at.layer + step });
  else if (move !== undefined) choose({ token: move });
  else return;
  event.preventDefault();
  if (event.currentTarget === $("strip")) $("strip").children[at.token].focus();
}

function whereIn(canvas, event, left, top, cell) {
  const box = canvas.getBoundingClientRect();
  return [Math.floor((event.clientX - box.left - left) / cell), Math.floor((event.clientY - box.top - top) / cell)];
}

function listen() {
  for (const id of ["strip", "lines"]) $(id).addEventListener("keydown", onKey);
  $("back").addEventListener("click", () => choose({ token: at.token - 1 }));
  $("on").addEventListener("click", () => choose({ token: at.token + 1 }));
  for (const name of ["layer", "head"]) {
    for (let i = 0; i < data.about[`${name}s`]; i++) $(name).append(new Option(String(i + 1), String(i)));
    $(name).addEventListener("change", ({ target }) => choose({ [name]: Number(target.value) }));
  }
  $("heat").addEventListener("click", (event) => {
    const [, token] = whereIn($("heat"), event, heat.left, heat.top, heat.cell);
    if (token >= 0 && token < T) choose({ token });
  });
  $("heat").addEventListener("pointermove", (event) => {
    const [k, t] = whereIn($("heat"), event, heat.left, heat.top, heat.cell);
    const inside = t >= 0 && t < T && k >= 0 && k <= t;
    $("heat").title = inside ? `${visible(word(t)[0]).trim()} → ${visible(word(k)[0]).trim()}: ${percent(weight(t, k))}` : "";
  });
  $("heads").addEventListener("click", (event) => {
    const [head, layer] = whereIn($("heads"), event, 0, 0, overview.side + overview.gap);
    choose({ head, layer });
  });
  $("heads-box").addEventListener("toggle", drawHeads);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showAttention);
  let width = innerWidth;
  addEventListener("resize", () => innerWidth !== width && (width = innerWidth) && showAttention());
}

makeStrip();
makeLines();
makeLayers();
makeParts();
listen();
showChosen();
showNext();
showLayers();
showAttention();
for (const part of data.answer) $("answer").append(typeof part === "string" ? part : made("b", "", named(part)));
