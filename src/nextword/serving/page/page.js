// The web page of `nextword serve`: chat and text completion.
//
// State is plain data: `render()` shows it, and event handlers change it and render again. Generated text is inserted as text
// only, never as HTML, a link or a style. Requests go to the server of this page only.

import { initInspector, hideInspector, positionInspector, visible, makeNavigable } from "./inspector.js";
import { CONNECTION_LOST, UserError, UNREACHABLE, streamEvents, connection, request, errorMessage } from "./server.js";
import { TextSegment, tokensOf } from "./text_segment.js";

const ALTERNATIVES = 5; // number of top log-probabilities requested for each token
const WIDE = matchMedia("(min-width: 68rem)"); // the settings fit beside the conversation, as in page.css

const state = {
  model: null, // {id, chat, task, context_length, precision}
  mode: "chat", // or "completion"
  exchanges: [], // [{question: text, null if a loaded conversation starts with the model, answer: TextSegment}]
  segments: [], // the text of the completion mode: TextSegments of the user (`isUser`) and of the model
  reading: false, // whether the text is shown with its tokens instead of in the text field
  editing: null, // the exchange whose message is being edited
  job: null, // the running generation: {controller, segment}
  serverError: null, // message while the server cannot be reached
  notice: "", // message about the last action
  undo: null, // function that reverts it
};

const $ = (id) => document.getElementById(id);
const el = (tag, properties, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};
const button = (text, label, onclick) => el("button", { type: "button", textContent: text, ariaLabel: label, onclick });
/** Sets a text only if it differs, so that screen readers do not repeat it and a selection in it survives. */
const setText = (node, text) => node.textContent !== text && (node.textContent = text);
/** Announces to screen readers. Streamed text is announced once, when it is complete. */
const announce = (text) => setText($("say"), text);
/** Storage can be disabled or full in a browser; the page works without it. */
const store = (where, name, value) => {
  try {
    window[where].setItem(name, value);
  } catch {
    return;
  }
};
const stored = (where, name) => {
  try {
    return window[where].getItem(name) ?? "";
  } catch {
    return "";
  }
};
const isChat = () => state.mode === "chat";

// ---------------------------------------------------------------------------------------------- connection

let retryDelay = 1; // seconds until the next attempt, doubled each time
let retryTimer = 0;

function setUnreachable(words) {
  state.serverError = words;
  clearTimeout(retryTimer);
  retryTimer = setTimeout(connect, retryDelay * 1000);
  retryDelay = Math.min(2 * retryDelay, 30);
  render();
}

/** Checks whether the server is ready, and reads its model unless it is known. */
async function connect() {
  clearTimeout(retryTimer);
  try {
    const health = await fetch("health", { cache: "no-store", signal: AbortSignal.timeout(8000) });
    if (!health.ok) throw new UserError(await errorMessage(health));
  } catch (error) {
    return setUnreachable(error instanceof UserError ? error.message : UNREACHABLE);
  }
  if (state.serverError === null && state.model) return;
  try {
    const { data: [{ id, nextword }] } = await (await request("v1/models")).json();
    if (!state.model && nextword?.chat === false && !state.exchanges.length) state.mode = "completion";
    state.model = { chat: true, ...nextword, id };
    document.title = `${id} · nextword`;
    showDefaults(state.model.sampling ?? {});
    if (state.serverError) Object.assign(state, { notice: "Reconnected. Nothing was lost.", undo: null });
    state.serverError = null;
    retryDelay = 1;
    countTokens();
  } catch (error) {
    setUnreachable(error instanceof UserError ? error.message : "The server did not report its model.");
    if (error.key) clearTimeout(retryTimer); // do not ask for the key repeatedly
  }
  render();
}

let keyRequest = null; // the open dialog, shared by all requests that wait for the key

const requestKey = () => keyRequest ??= new Promise((resolve) => {
  const dialog = $("key-dialog");
  if (connection.key) $("key-about").textContent = "The server rejected the key.";
  Object.assign(dialog, { returnValue: "" }).showModal();
  dialog.addEventListener("close", () => {
    const given = dialog.returnValue === "use";
    if (given) connection.key = $("key").value.trim();
    store("sessionStorage", "nextword-key", given && $("key-keep").checked ? connection.key : "");
    $("key").value = "";
    keyRequest = null;
    resolve(given);
  }, { once: true });
});

// ---------------------------------------------------------------------------------------------- generation

const samplingInputs = () => [...$("sampling").querySelectorAll("input[type=range], input[type=number]")];

/** The defaults of the model, for settings that were not changed. */
function showDefaults(defaults) {
  for (const field of samplingInputs()) {
    const value = defaults[field.name];
    if (value === undefined || value === null) continue;
    const isChanged = field.value !== field.defaultValue;
    if (field.name === "top_k") { // an empty field leaves it to the server
      field.placeholder = value || "off";
      continue;
    }
    if (field.type === "range") {
      field.max = Math.max(field.max, value);
      field.min = Math.min(field.min, value);
    }
    const changed = field.value;
    field.defaultValue = field.value = value;
    if (Number(field.value) !== value) Object.assign(field, { step: "any", value }); // between two steps of a slider
    if (isChanged) field.value = changed;
  }
  showSettings();
}

/** The sampling settings; empty ones are left to the server. */
function sampling() {
  return Object.fromEntries(samplingInputs().filter(({ value }) => value !== "").map(({ name, value }) => [name, Number(value)]));
}

/** Whether a request can be sent. Shows an invalid setting with its error. */
async function ready() {
  if (!$("sampling").checkValidity()) {
    openSettings();
    return $("sampling").reportValidity();
  }
  if (state.serverError !== null) await connect();
  return state.serverError === null; // the input is kept until the server is back
}

/** Streams a generation into a segment. */
async function generate(path, body, segment) {
  const controller = new AbortController();
  const isConversation = isChat(); // a text may exceed the context
  const job = (state.job = { controller, segment });
  render(true);
  try {
    const response = await request(path, {
      body: { model: state.model?.id, ...body, ...sampling(), stream: true, stream_options: { include_usage: true } },
      signal: controller.signal,
      onWait: (note) => ((segment.note = note), render()),
    });
    segment.note = "";
    for await (const event of streamEvents(response)) {
      const choice = event.choices?.[0];
      if (choice) segment.add(choice.delta?.content ?? choice.text ?? "", tokensOf(choice));
      segment.finish = choice?.finish_reason ?? segment.finish;
      segment.usage = event.usage ?? segment.usage;
      segment.dropped = event.nextword?.dropped_messages ?? segment.dropped;
      framed ||= requestAnimationFrame(() => render());
    }
    const isFull = isConversation && segment.usage?.total_tokens >= state.model?.context_length;
    if (segment.usage) segment.limit = isFull ? "a full context" : "max tokens";
    segment.end("done");
  } catch (error) {
    const stopped = controller.signal.aborted;
    segment.end(stopped ? "stopped" : "failed", stopped ? "" : error instanceof UserError ? error.message : CONNECTION_LOST);
    if (segment.note === CONNECTION_LOST) connect(); // shows a message if the server is gone
  }
  if (state.job === job) state.job = null;
  announce(segment.note || `${segment.status === "stopped" ? "Stopped. " : ""}Model: ${segment.text}`);
  countTokens(segment.usage?.total_tokens);
  const stopFocused = document.activeElement === $(isChat() ? "stop" : "text-stop");
  render();
  if (!stopFocused) return;
  // The focused button is hidden now: focus the generated text, whose tokens the arrow keys select.
  [...document.querySelectorAll("#main section:not([hidden]) .model")].at(-1).focus();
  hideInspector();
}

function stop() {
  state.job?.controller.abort();
  state.job = null;
}

/** Shows a notice, and keeps the current state so that the next change can be undone. */
function undoable(notice) {
  stop();
  const { exchanges, segments, reading } = state;
  const undo = () => {
    stop();
    Object.assign(state, { exchanges, segments, reading, editing: null, notice: "", undo: null });
    $("text").value = completionText();
    countTokens();
    render(true);
  };
  Object.assign(state, { notice, undo });
}

// ---------------------------------------------------------------------------------------------- conversation

/** The messages for the API and for `nextword finetune`. Unanswered messages are left out, as in `nextword chat`, since roles
 * must alternate. */
function toMessages(exchanges) {
  const system = $("system").value.trim();
  const turns = exchanges.filter(({ answer }) => answer.text.trim()).flatMap(({ question, answer }) => [
    ...(question === null ? [] : [{ role: "user", content: question }]),
    { role: "assistant", content: answer.text },
  ]);
  return system ? [{ role: "system", content: system }, ...turns] : turns;
}

/** Sends a message after these exchanges. */
function submitMessage(question, before) {
  const exchange = { question, answer: new TextSegment() };
  const messages = [...toMessages(before), { role: "user", content: question }];
  Object.assign(state, { exchanges: [...before, exchange], editing: null });
  generate("v1/chat/completions", { messages, truncation: "auto", logprobs: true, top_logprobs: ALTERNATIVES }, exchange.answer);
}

async function send() {
  const question = $("draft").value.trim();
  if (!question || state.job || !(await ready()) || state.job) return;
  $("draft").value = "";
  fitHeight($("draft"));
  Object.assign(state, { notice: "", undo: null });
  submitMessage(question, state.exchanges);
}

const before = (exchange) => state.exchanges.slice(0, state.exchanges.indexOf(exchange));

async function regenerate(exchange) {
  if (!(await ready())) return;
  undoable(exchange.answer.text ? "The answer was regenerated." : "");
  submitMessage(exchange.question, before(exchange));
  $("stop").focus();
}

function edit(exchange) {
  state.editing = exchange;
  render();
  views.get(exchange).node.querySelector("textarea").focus();
}

async function finishEdit(exchange, text) {
  if (text?.trim() && (await ready())) {
    undoable("The conversation continues from the edited message.");
    submitMessage(text.trim(), before(exchange));
  } else if (text === null) state.editing = null;
  else return;
  render();
  $("draft").focus();
}

// ---------------------------------------------------------------------------------------------- completion

const completionText = () => state.segments.map(({ text }) => text).join("");

/** Updates the segments from the text field. Unedited text of the model keeps its tokens. */
function syncSegments() {
  if (state.reading) return;
  const text = $("text").value;
  const parts = [];
  let at = 0;
  for (const part of state.segments) {
    let same = 0;
    while (same < part.text.length && part.text[same] === text[at + same]) same++;
    if (same < part.text.length && /[\ud800-\udbff]/.test(part.text[same - 1])) same--; // not in the middle of a character
    if (same) parts.push(same === part.text.length ? part : part.prefix(same));
    at += same;
    if (same < part.text.length) break;
  }
  if (at < text.length) parts.push(TextSegment.plain(text.slice(at), true));
  state.segments = parts;
}

async function continueText() {
  if (state.job || !(await ready()) || state.job) return;
  syncSegments();
  const prompt = completionText();
  if (!prompt.trim()) {
    Object.assign(state, { notice: "Write the beginning of a text first.", undo: null });
    render();
    $("text").focus();
    return;
  }
  const segment = new TextSegment();
  Object.assign(state, { segments: [...state.segments, segment], reading: true });
  generate("v1/completions", { prompt, logprobs: ALTERNATIVES, truncate_prompt_tokens: -1 }, segment);
  $("reading").focus();
  hideInspector();
}

async function regenerateText() {
  if (!(await ready())) return;
  undoable("The continuation was regenerated.");
  state.segments = state.segments.slice(0, -1);
  continueText();
}

function editText() {
  state.reading = false;
  $("text").value = completionText();
  render();
  $("text").focus();
  $("text").setSelectionRange($("text").value.length, $("text").value.length);
}

// ---------------------------------------------------------------------------------------------- render

let framed = 0; // the pending animation frame, shared by all tokens that arrive before it

function render(follow = false) {
  cancelAnimationFrame(framed);
  framed = 0;
  const page = document.documentElement;
  const atEnd = page.scrollTop + innerHeight >= page.scrollHeight - 60;
  $("conversation").hidden = $("composer").hidden = $("chat-keys").hidden = $("for-chat").hidden = !isChat();
  $("completion").hidden = isChat();
  $("mode-chat").ariaPressed = String(isChat());
  $("mode-completion").ariaPressed = String(!isChat());
  $("skip").href = isChat() ? "#draft" : state.reading ? "#reading" : "#text";
  $("banner").hidden = state.serverError === null;
  setText($("banner-text"), state.serverError ?? "");
  setText($("notice-text"), state.notice);
  $("notice").classList.toggle("empty", !state.notice);
  $("undo").hidden = !state.notice || !state.undo;
  for (const id of ["send", "continue"]) $(id).hidden = state.job !== null;
  for (const id of ["stop", "text-stop"]) $(id).hidden = state.job === null;
  renderModel();
  if (isChat()) renderConversation();
  else renderText();
  positionInspector();
  if (follow || (atEnd && state.job)) page.scrollTop = page.scrollHeight;
}

function renderModel() {
  if (!state.model) return;
  const { id, chat, context_length: length, precision, task } = state.model;
  const facts = [length && `reads ${length.toLocaleString("en")} tokens`, precision, task].filter(Boolean);
  setText($("model-name"), id);
  setText($("model-facts"), facts.join(" · "));
  setText($("hint"), chat ? "" : isChat()
    ? "This model is not fine-tuned for chat: expect it to continue your text rather than to answer."
    : "This model is not fine-tuned for chat. It continues a text.");
  $("hint").hidden = chat;
}

function renderConversation() {
  const list = $("exchanges");
  state.exchanges.forEach((exchange, i) => {
    if (!views.has(exchange)) views.set(exchange, makeView(exchange));
    const { node, update } = views.get(exchange);
    if (list.children[i] !== node) list.insertBefore(node, list.children[i] ?? null);
    update();
  });
  while (list.children.length > state.exchanges.length) list.lastChild.remove();
  $("welcome").hidden = state.exchanges.length > 0;
  if (!state.job) fitHeight($("draft")); // not with every token
}

function renderText() {
  const { segments, reading, job } = state;
  const last = segments.at(-1);
  $("text").hidden = $("text-name").hidden = reading;
  $("reading").hidden = $("text-edit").hidden = !reading;
  $("text-again").hidden = job !== null || !reading || !last || last.isUser;
  setText($("text-note"), reading && last ? statusNote(last) : "");
  $("text-note").classList.toggle("failed", last?.status === "failed");
  if (!reading) return fitHeight($("text"));
  const boxes = [...$("reading").children];
  segments.forEach((part, i) => {
    if (boxes[i]?.part !== part) {
      const box = el("span", { part, className: part.isUser ? "own" : "" });
      if (boxes[i]) boxes[i].replaceWith(box);
      else $("reading").append(box);
      boxes[i] = box;
    }
    showSegment(boxes[i], part);
  });
  boxes.slice(segments.length).forEach((box) => box.remove());
}

/** Makes a field as high as its text, up to the maximum in page.css. */
function fitHeight(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}

const probabilityBand = (p) => (p >= 0.9 ? "p0" : p >= 0.5 ? "p1" : p >= 0.2 ? "p2" : p >= 0.05 ? "p3" : "p4");

/** Shows a segment in a box. Existing pieces never change, so a selection in them survives. */
function showSegment(box, segment) {
  const pending = (box.pending ??= box.appendChild(el("span")));
  for (const piece of segment.pieces.slice(box.childElementCount - 1)) {
    const known = piece.tokens.filter(({ p }) => p !== null);
    // The probability of a piece is the product of those of its tokens.
    const band = known.length ? probabilityBand(known.reduce((all, { p }) => all * p, 1)) : "";
    const span = el("span", { className: `token ${band}`, textContent: visible(piece.text), piece });
    if (!piece.text) span.dataset.mark = piece.tokens.map(({ name }) => name).join("");
    span.classList.toggle("newline", piece.text.includes("\n"));
    pending.before(span);
  }
  setText(pending, visible(segment.pending));
  box.classList.toggle("writing", segment === state.job?.segment);
}

const statusNote = (segment) =>
  segment.note || (segment !== state.job?.segment ? segment.summary : segment.text ? "" : "Processing the prompt …");

const views = new WeakMap(); // exchange → {node, update}

function makeView(exchange) {
  const { question, answer } = exchange;
  const questionBox = el("div", { className: "asked text", dir: "auto", textContent: visible(question ?? "") });
  const box = el("div", { className: "text model", dir: "auto" });
  const note = el("p", { className: "note" });
  const retry = button("Try again", "Retry the request", () => regenerate(exchange));
  const again = button("Regenerate", "Regenerate this answer", () => regenerate(exchange));
  const forQuestion = el("div", { className: "actions quiet-actions" },
    button("Edit", "Edit this message", () => edit(exchange)),
    button("Copy", "Copy this message", ({ currentTarget }) => copy(question, currentTarget)));
  const forAnswer = el("div", { className: "actions quiet-actions" },
    button("Copy", "Copy this answer", ({ currentTarget }) => copy(answer.text, currentTarget)), again);
  const you = el("div", { className: "you", hidden: question === null },
    el("h2", { className: "unseen", textContent: "You" }), questionBox, forQuestion);
  const node = el("li", { className: "exchange" }, you, el("h2", { className: "unseen", textContent: "The model" }), box,
    el("div", { className: "end" }, note, retry, forAnswer));
  let form = null;

  function update() {
    const busy = answer === state.job?.segment;
    const failed = answer.status === "failed";
    showSegment(box, answer);
    if (answer.pieces.length && box.tabIndex < 0) makeNavigable(box, "Answer");
    box.ariaBusy = String(busy);
    box.hidden = !answer.text && !answer.pieces.length;
    setText(note, statusNote(answer));
    note.classList.toggle("failed", failed);
    retry.hidden = !failed;
    forAnswer.hidden = busy || failed;
    again.hidden = question === null; // it answers no message
    if ((state.editing === exchange) === (form !== null)) return;
    form?.remove();
    form = form ? null : you.appendChild(editForm(exchange));
    questionBox.hidden = forQuestion.hidden = form !== null;
  }
  return { node, update };
}

function editForm(exchange) {
  const field = el("textarea", { value: exchange.question, dir: "auto", ariaLabel: "The edited message", rows: 2 });
  const onsubmit = (event) => (event.preventDefault(), finishEdit(exchange, field.value));
  const sends = ({ key, shiftKey, isComposing }) => key === "Enter" && !shiftKey && !isComposing;
  field.addEventListener("keydown", (event) => sends(event) && onsubmit(event));
  return el("form", { className: "edit", onsubmit }, field, el("div", { className: "actions" },
    el("button", { type: "submit", className: "main", textContent: "Send again" }),
    button("Cancel", "Cancel the edit", () => finishEdit(exchange, null))));
}

// ---------------------------------------------------------------------------------------------- token count

let counting = 0;

/** Shows the number of tokens and the context length: as reported by the server, or from /tokenize after a delay. */
function countTokens(known) {
  clearTimeout(counting);
  const room = state.model?.context_length;
  const show = (n) => {
    const [all, read] = [n, room ?? 0].map((number) => number.toLocaleString("en"));
    const over = n > room;
    // Both may exceed the context length: a text loses its beginning, a conversation its oldest turns.
    const words = !over ? `${all} of ${read} tokens`
      : isChat() ? `${all} tokens, the model reads ${read}: the oldest turns are dropped` : `${all} tokens, the model reads the last ${read}`;
    setText($("count"), !n ? "" : room ? words : `${all} tokens`);
    $("count").classList.toggle("over", over && isChat());
  };
  if (known) return void show(known);
  const draft = $("draft").value.trim();
  const messages = [...toMessages(state.exchanges), ...(draft ? [{ role: "user", content: draft }] : [])];
  const prompt = isChat() ? messages.map(({ content }) => content).join("\n") : state.reading ? completionText() : $("text").value;
  if (!prompt) return void show(0);
  const body = { model: state.model?.id, ...(isChat() ? { messages } : { prompt }) };
  counting = setTimeout(async () => {
    if (state.serverError !== null || state.job || !state.model) return;
    // A failed count shows nothing; errors are reported when a message is sent.
    show(await request("tokenize", { body }).then((response) => response.json()).then(({ count }) => count, () => 0));
  }, 350);
}

// ---------------------------------------------------------------------------------------------- files

async function copy(text, from) {
  if (!(await navigator.clipboard?.writeText(text).then(() => true, () => false))) {
    // The clipboard API needs https, which a local network does not have.
    const field = document.body.appendChild(el("textarea", { value: text, className: "unseen" }));
    field.select();
    document.execCommand("copy");
    field.remove();
    from.focus();
  }
  from.textContent = "Copied";
  setTimeout(() => (from.textContent = "Copy"), 1200);
  announce("Copied.");
}

function save() {
  syncSegments();
  const messages = toMessages(state.exchanges);
  const text = isChat() ? `${JSON.stringify({ messages })}\n` : completionText();
  if (isChat() ? messages.at(-1)?.role !== "assistant" : !text) {
    Object.assign(state, { notice: "There is nothing to save yet.", undo: null });
    return render();
  }
  const address = URL.createObjectURL(new Blob([text]));
  const when = new Date().toISOString().slice(0, 16).replace(/[T:]/g, "-");
  el("a", { href: address, download: isChat() ? `conversation-${when}.jsonl` : `text-${when}.txt` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** The exchanges and the system message of the last conversation in a file, and the number of conversations. */
function parseConversation(text) {
  const read = text.split("\n").flatMap((line, i) => {
    try {
      return line.trim() ? [JSON.parse(line)] : [];
    } catch {
      throw new UserError(`Line ${i + 1} is not JSON. A conversation is a line such as {"messages": [...]}.`);
    }
  });
  const messages = read.at(-1)?.messages;
  if (!Array.isArray(messages)) throw new UserError('The file has no line such as {"messages": [...]}.');
  const exchanges = [];
  let system = "";
  messages.forEach((message, i) => {
    const { role, content } = message ?? {};
    const last = exchanges.at(-1);
    if (typeof content !== "string") throw new UserError(`Message ${i + 1} has no text as its content.`);
    if (role === "system" && i === 0) system = content;
    else if (role === "user") exchanges.push({ question: content, answer: TextSegment.plain("") });
    else if (role === "assistant" && last?.answer.text === "") last.answer.text = content;
    else if (role === "assistant") exchanges.push({ question: null, answer: TextSegment.plain(content) });
    else throw new UserError(`Message ${i + 1} has the role ${role}; supported are user, assistant, and system for the first message.`);
  });
  return { exchanges, system, conversations: read.length };
}

async function load(file) {
  const text = await file.text();
  try {
    if (isChat()) {
      const { exchanges, system, conversations } = parseConversation(text);
      const several = `Loaded the last of ${conversations} conversations.`;
      undoable(conversations > 1 ? several : "Conversation loaded.");
      Object.assign(state, { exchanges, editing: null });
      $("system").value = system;
    } else {
      syncSegments();
      undoable("Text loaded.");
      Object.assign(state, { segments: [TextSegment.plain(text, true)], reading: false });
      $("text").value = text;
    }
  } catch (error) {
    if (!(error instanceof UserError)) throw error;
    Object.assign(state, { notice: `The file could not be loaded. ${error.message}`, undo: null });
  }
  if ($("settings").matches(":modal")) $("settings").close();
  countTokens();
  render(true);
}

const restoreExchange = ([question, text, isPartial, finish, limit]) => {
  const answer = Object.assign(TextSegment.plain(text), { finish, limit });
  return { question, answer: isPartial ? Object.assign(answer, { status: "stopped" }) : answer };
};

// Texts and settings survive a reload of this tab; probabilities do not.
function saveSession() {
  syncSegments();
  const fields = [...$("sampling").querySelectorAll("[name]")].map(({ id, value }) => [id, value]);
  const exchanges = state.exchanges.map(({ question, answer }) => [question, answer.text, answer.status !== "done", answer.finish, answer.limit]);
  fields.push(["text", completionText()], ["draft", $("draft").value]);
  store("sessionStorage", "nextword", JSON.stringify({ mode: state.mode, exchanges, fields, plain: !$("underline").checked }));
}

function restoreSession() {
  document.documentElement.dataset.theme = stored("localStorage", "nextword-theme");
  connection.key = stored("sessionStorage", "nextword-key");
  const before = stored("sessionStorage", "nextword");
  if (!before) return;
  const { mode, exchanges, fields, plain } = JSON.parse(before);
  Object.assign(state, { mode, exchanges: exchanges.map(restoreExchange) });
  for (const [id, value] of fields) if ($(id)) $(id).value = value;
  $("underline").checked = !plain;
  syncSegments();
}

// ---------------------------------------------------------------------------------------------- event handlers

function openSettings() {
  if ($("settings").open) return;
  if (WIDE.matches) $("settings").show();
  else $("settings").showModal();
  $("open-settings").ariaExpanded = "true";
}

/** The event is late: keep the focus if the user has moved to another field. */
function onSettingsClosed() {
  $("open-settings").ariaExpanded = "false";
  if (document.activeElement === document.body) $("open-settings").focus();
}

function showSettings() {
  for (const output of document.querySelectorAll("output")) setText(output, $(output.htmlFor.value).value);
  document.body.classList.toggle("plain", !$("underline").checked);
}

function setMode(mode) {
  stop();
  Object.assign(state, { mode, notice: "", undo: null, editing: null });
  countTokens();
  render();
}

function startNew() {
  syncSegments();
  if (isChat() ? state.exchanges.length : state.segments.length) undoable(isChat() ? "New conversation." : "New text.");
  Object.assign(state, isChat() ? { exchanges: [], editing: null } : { segments: [], reading: false });
  if (!isChat()) $("text").value = "";
  countTokens();
  render();
  $(isChat() ? "draft" : "text").focus();
}

function switchTheme() {
  const { dataset } = document.documentElement;
  const dark = dataset.theme ? dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  store("localStorage", "nextword-theme", (dataset.theme = dark ? "light" : "dark"));
}

function onKey(event) {
  const { target, key } = event;
  if (event.isComposing) return; // the input method uses Enter and Esc
  if (key === "Escape" && !document.querySelector("dialog:modal")) {
    hideInspector();
    if (state.job) $(isChat() ? "stop" : "text-stop").click();
    else if (state.editing) finishEdit(state.editing, null);
  } else if (key === "Enter" && target === $("draft") && !event.shiftKey) {
    event.preventDefault();
    send();
  } else if (key === "ArrowUp" && target === $("draft") && !target.value && !state.job) {
    const last = state.exchanges.findLast(({ question }) => question !== null);
    if (last) (event.preventDefault(), edit(last));
  } else if (key === "Enter" && (event.ctrlKey || event.metaKey) && !isChat()) {
    event.preventDefault();
    continueText();
  }
}

function addListeners() {
  const on = (id, type, act) => $(id).addEventListener(type, act);
  const press = (id, act) => on(id, "click", () => act());
  on("composer", "submit", (event) => (event.preventDefault(), send()));
  press("stop", () => (stop(), $("draft").focus()));
  press("text-stop", () => (stop(), $("reading").focus(), hideInspector()));
  press("mode-chat", () => (syncSegments(), setMode("chat")));
  press("mode-completion", () => setMode("completion"));
  press("new", startNew);
  press("continue", continueText);
  press("text-again", regenerateText);
  press("text-edit", () => (stop(), editText()));
  on("text-copy", "click", ({ currentTarget }) => (syncSegments(), copy(completionText(), currentTarget)));
  press("undo", () => (state.undo(), $(isChat() ? "draft" : "new").focus()));
  press("banner-retry", connect);
  press("open-settings", () => ($("settings").open ? $("settings").close() : openSettings()));
  press("close-settings", () => $("settings").close());
  on("settings", "close", onSettingsClosed);
  WIDE.addEventListener("change", () => $("settings").close());
  on("sampling", "input", showSettings);
  press("defaults", () => (samplingInputs().forEach((field) => (field.value = field.defaultValue)), showSettings()));
  on("sampling", "submit", (event) => event.preventDefault()); // Enter in a field does not close the settings
  press("save", save);
  press("load", () => $("file").click());
  on("file", "change", () => ($("file").files[0] && load($("file").files[0]), ($("file").value = "")));
  press("theme", switchTheme);
  for (const id of ["draft", "text"]) on(id, "input", () => (fitHeight($(id)), countTokens()));
  document.addEventListener("keydown", onKey);
  addEventListener("pagehide", saveSession);
  addEventListener("online", connect);
  // Detects a lost server before the next message.
  const checkServer = () => !document.hidden && !state.job && state.serverError === null && connect();
  document.addEventListener("visibilitychange", checkServer);
  setInterval(checkServer, 20_000);
}

Object.assign(connection, { requestKey, onUnreachable: setUnreachable });
restoreSession();
addListeners();
initInspector(announce);
makeNavigable($("reading"), "The text");
showSettings();
if (WIDE.matches) openSettings();
render();
$(isChat() ? "draft" : "text").focus();
connect();
