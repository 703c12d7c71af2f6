// The alternatives of a token, in a box beside the token that is hovered, tapped or selected by the arrow keys.

import { asText } from "./text_segment.js";

const $ = (id) => document.getElementById(id);
const element = (tag, className, ...children) => {
  const node = Object.assign(document.createElement(tag), { className });
  node.append(...children); // strings are inserted as text, never as HTML
  return node;
};

/** Shows control characters by their Unicode pictures. Copying and saving keep the characters. */
export const visible = (text) =>
  text.replace(/[\x00-\x08\x0b-\x1f\x7f]/g, (c) => String.fromCharCode(c === "\x7f" ? 0x2421 : 0x2400 + c.charCodeAt(0)));

const percent = (p) => (p >= 0.9995 ? "over 99.9 %" : p < 0.0005 ? "under 0.1 %" : `${(100 * p).toFixed(1)} %`);

/** A token with visible spaces, or its bytes if it is part of a character. */
function displayName({ name, bytes }) {
  if (!bytes.length) return name;
  const text = asText(bytes);
  if (text.includes("\ufffd")) return bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ").toUpperCase();
  return visible(text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥"));
}

/** The most likely tokens at this position and the sampled one, by descending probability. */
function tokenCandidates(token) {
  const isSampled = (other) => other.name === token.name && String(other.bytes) === String(token.bytes);
  const all = token.others.some(isSampled) ? token.others : [...token.others, token];
  return all.filter(({ p }) => p !== null).sort((a, b) => b.p - a.p).map((other) => ({ ...other, isSampled: isSampled(other) }));
}

function tokenDetails(token) {
  const candidates = tokenCandidates(token);
  const left = 1 - candidates.reduce((sum, { p }) => sum + p, 0);
  const rows = candidates.map((other) => {
    const bar = element("i", "");
    bar.style.width = `${100 * other.p}%`; // by script, since the content security policy allows no inline style
    return element("li", other.isSampled ? "taken" : "", element("bdi", "", displayName(other)), element("span", "", bar),
      element("b", "", percent(other.p)));
  });
  const known = token.p === null ? "probability unknown" : percent(token.p);
  return [
    element("p", "title", element("bdi", "", displayName(token)), ` ${known}`),
    element("ol", "", ...rows),
    element("p", "others", candidates.length && left >= 0.0005 ? `${percent(left)} for all other tokens` : ""),
  ];
}

function spokenDescription(token) {
  const others = tokenCandidates(token).filter(({ isSampled }) => !isSampled).map((other) => `${displayName(other)} ${percent(other.p)}`);
  const known = token.p === null ? "" : `, ${percent(token.p)}`;
  return `${displayName(token)}${known}${others.length ? `; others: ${others.join(", ")}` : ""}.`;
}

const now = { span: null, pinned: false, timer: 0, at: "" };

function showInspector(span, announce) {
  hideInspector();
  Object.assign(now, { span, pinned: announce !== undefined });
  span.classList.add("inspected");
  $("inspector").replaceChildren(...span.piece.tokens.flatMap(tokenDetails));
  $("inspector").hidden = false;
  announce?.(span.piece.tokens.map(spokenDescription).join(" "));
  positionInspector();
}

export function hideInspector() {
  clearTimeout(now.timer);
  now.span?.classList.remove("inspected");
  Object.assign(now, { span: null, pinned: false, timer: 0 });
  $("inspector").hidden = true;
}

/** Positions the box above its token, or below it without room, inside the window. */
export function positionInspector() {
  if (!now.span) return;
  if (!now.span.isConnected) return void hideInspector();
  const box = $("inspector");
  // The longer part of a token that is split between two lines.
  const at = [...now.span.getClientRects()].sort((a, b) => b.width - a.width)[0] ?? now.span.getBoundingClientRect();
  const above = at.top - box.offsetHeight - 6;
  box.style.left = `${Math.max(8, Math.min(at.left - 12, document.documentElement.clientWidth - box.offsetWidth - 8))}px`;
  box.style.top = `${above >= 8 ? above : Math.min(at.bottom + 6, innerHeight - box.offsetHeight - 8)}px`;
}

/** Makes the tokens of a box selectable by arrow keys. The box is one tab stop. */
export function makeNavigable(box, name) {
  Object.assign(box, { tabIndex: 0, role: "group", ariaLabel: `${name}: use the arrow keys to select a token` });
}

function onKey(event, announce) {
  if (!event.target.matches?.(".model[tabindex]") || event.ctrlKey || event.altKey || event.metaKey) return;
  const spans = [...event.target.querySelectorAll(".token")];
  const here = spans.indexOf(now.span);
  const to = spans[{ ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: spans.length - 1 }[event.key]];
  if (!to) return;
  event.preventDefault();
  to.scrollIntoView({ block: "nearest" });
  showInspector(to, announce);
}

/** Shows the box when the pointer rests on a token, and hides it when the pointer leaves both. */
function onPointer({ target, pointerType, clientX, clientY }) {
  const still = now.at === (now.at = `${clientX} ${clientY}`); // the text moved, not the pointer
  if (pointerType !== "mouse" || now.pinned || still) return;
  const span = target.closest?.(".token");
  clearTimeout(now.timer);
  if (span?.piece && span !== now.span) now.timer = setTimeout(() => span.isConnected && showInspector(span), 90);
  else if (!span && now.span && !target.closest?.("#inspector")) now.timer = setTimeout(hideInspector, 160);
}

export function initInspector(announce) {
  document.addEventListener("pointerover", onPointer);
  document.addEventListener("pointermove", ({ clientX, clientY }) => (now.at = `${clientX} ${clientY}`));
  document.addEventListener("keydown", (event) => onKey(event, announce));
  document.addEventListener("click", ({ target }) => {
    const span = target.closest?.(".token");
    if (span?.piece && !(now.pinned && now.span === span)) showInspector(span, announce);
    else if (!target.closest?.("#inspector")) hideInspector();
  });
  document.addEventListener("focusin", ({ target }) => {
    const first = target.matches(".model[tabindex]:focus-visible") && target.querySelector(".token");
    if (first) showInspector(first, announce);
  });
  document.addEventListener("focusout", ({ target }) => target.matches(".model[tabindex]") && hideInspector());
  addEventListener("scroll", positionInspector, { passive: true });
  addEventListener("resize", positionInspector);
}
