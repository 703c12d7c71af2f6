// What a token could have been: a box beside the token that is pointed at, tapped, or walked to by the arrow keys.

import { asText } from "./writing.js";

const $ = (id) => document.getElementById(id);
const element = (tag, className, ...children) => {
  const node = Object.assign(document.createElement(tag), { className });
  node.append(...children); // a child that is a text is only ever a text
  return node;
};

/** Control characters by their pictures, so that nothing hides in a text; copying and saving keep them as they are. */
export const visible = (text) =>
  text.replace(/[\x00-\x08\x0b-\x1f\x7f]/g, (c) => String.fromCharCode(c === "\x7f" ? 0x2421 : 0x2400 + c.charCodeAt(0)));

const percent = (p) => (p >= 0.9995 ? "over 99.9 %" : p < 0.0005 ? "under 0.1 %" : `${(100 * p).toFixed(1)} %`);

/** A token so that its spaces can be seen, and its bytes where it is part of a character. */
function nameOf({ name, bytes }) {
  if (!bytes.length) return name;
  const text = asText(bytes);
  if (text.includes("\ufffd")) return bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ").toUpperCase();
  return visible(text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥"));
}

/** The likeliest tokens in a token's place, itself among them, the likeliest first. */
function candidatesOf(token) {
  const taken = (other) => other.name === token.name && String(other.bytes) === String(token.bytes);
  const all = token.others.some(taken) ? token.others : [...token.others, token];
  return all.filter(({ p }) => p !== null).sort((a, b) => b.p - a.p).map((other) => ({ ...other, taken: taken(other) }));
}

function detailsOf(token) {
  const candidates = candidatesOf(token);
  const left = 1 - candidates.reduce((sum, { p }) => sum + p, 0);
  const rows = candidates.map((other) => {
    const bar = element("i", "");
    bar.style.width = `${100 * other.p}%`; // by script: the page's policy allows no style in markup
    return element("li", other.taken ? "taken" : "", element("bdi", "", nameOf(other)), element("span", "", bar),
      element("b", "", percent(other.p)));
  });
  const told = token.p === null ? "its probability was not told" : percent(token.p);
  return [
    element("p", "title", element("bdi", "", nameOf(token)), ` ${told}`),
    element("ol", "", ...rows),
    element("p", "others", candidates.length && left >= 0.0005 ? `${percent(left)} for all other tokens together` : ""),
  ];
}

function spokenOf(token) {
  const others = candidatesOf(token).filter(({ taken }) => !taken).map((other) => `${nameOf(other)} ${percent(other.p)}`);
  const told = token.p === null ? "" : `, ${percent(token.p)}`;
  return `${nameOf(token)}${told}${others.length ? `; others: ${others.join(", ")}` : ""}.`;
}

const now = { span: null, pinned: false, timer: 0, at: "" };

function lookAt(span, say) {
  lookAway();
  Object.assign(now, { span, pinned: say !== undefined });
  span.classList.add("looked");
  $("inspector").replaceChildren(...span.piece.tokens.flatMap(detailsOf));
  $("inspector").hidden = false;
  say?.(span.piece.tokens.map(spokenOf).join(" "));
  place();
}

export function lookAway() {
  clearTimeout(now.timer);
  now.span?.classList.remove("looked");
  Object.assign(now, { span: null, pinned: false, timer: 0 });
  $("inspector").hidden = true;
}

/** The box beside its token, above it where there is room, and never out of the window. */
export function place() {
  if (!now.span) return;
  if (!now.span.isConnected) return void lookAway();
  const box = $("inspector");
  // Of a token that is parted between two lines, the longer part.
  const at = [...now.span.getClientRects()].sort((a, b) => b.width - a.width)[0] ?? now.span.getBoundingClientRect();
  const above = at.top - box.offsetHeight - 6;
  box.style.left = `${Math.max(8, Math.min(at.left - 12, document.documentElement.clientWidth - box.offsetWidth - 8))}px`;
  box.style.top = `${above >= 8 ? above : Math.min(at.bottom + 6, innerHeight - box.offsetHeight - 8)}px`;
}

/** A box of text whose tokens the arrow keys go through: one stop of the Tab key, however long the text is. */
export function walkable(box, name) {
  Object.assign(box, { tabIndex: 0, role: "group", ariaLabel: `${name}: the arrow keys go through its tokens` });
}

function onKey(event, say) {
  if (!event.target.matches?.(".model[tabindex]") || event.ctrlKey || event.altKey || event.metaKey) return;
  const spans = [...event.target.querySelectorAll(".token")];
  const here = spans.indexOf(now.span);
  const to = spans[{ ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: spans.length - 1 }[event.key]];
  if (!to) return;
  event.preventDefault();
  to.scrollIntoView({ block: "nearest" });
  lookAt(to, say);
}

/** A pointer looks for as long as it rests, on the token or on the box, and leaves no trail of boxes on its way. */
function onPointer({ target, pointerType, clientX, clientY }) {
  const still = now.at === (now.at = `${clientX} ${clientY}`); // it is the text that moves, while it is written
  if (pointerType !== "mouse" || now.pinned || still) return;
  const span = target.closest?.(".token");
  clearTimeout(now.timer);
  if (span?.piece && span !== now.span) now.timer = setTimeout(() => span.isConnected && lookAt(span), 90);
  else if (!span && now.span && !target.closest?.("#inspector")) now.timer = setTimeout(lookAway, 160);
}

export function listenToLooks(say) {
  document.addEventListener("pointerover", onPointer);
  document.addEventListener("pointermove", ({ clientX, clientY }) => (now.at = `${clientX} ${clientY}`));
  document.addEventListener("keydown", (event) => onKey(event, say));
  document.addEventListener("click", ({ target }) => {
    const span = target.closest?.(".token");
    if (span?.piece && !(now.pinned && now.span === span)) lookAt(span, say);
    else if (!target.closest?.("#inspector")) lookAway();
  });
  document.addEventListener("focusin", ({ target }) => {
    const first = target.matches(".model[tabindex]:focus-visible") && target.querySelector(".token");
    if (first) lookAt(first, say);
  });
  document.addEventListener("focusout", ({ target }) => target.matches(".model[tabindex]") && lookAway());
  addEventListener("scroll", place, { passive: true });
  addEventListener("resize", place);
}
