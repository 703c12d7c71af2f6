// The page on which people talk with the model that they made.
//
// State is plain data, `render()` shows it, and what people do changes the state and renders again. What a model writes is
// only ever put into the page as text: never as HTML, a link or a style. Nothing is asked of any server but this page's own.

import { listenToLooks, lookAway, place, visible, walkable } from "./inspector.js";
import { BROKEN, Problem, UNREACHABLE, eventsOf, link, request, wordsOf } from "./server.js";
import { Writing, tokensOf } from "./writing.js";

const ALTERNATIVES = 5; // how many of the likeliest tokens are asked for with each token
const WIDE = matchMedia("(min-width: 68rem)"); // where the settings have room beside the conversation, as in page.css

const state = {
  model: null, // {id, chat, task, context_length, precision}
  mode: "chat", // or "completion"
  exchanges: [], // [{asked: a text, or null where a loaded conversation begins with the model, answer: Writing}]
  paper: [], // the text of the completion mode: Writings of people (`own`) and of the model, in turns
  reading: false, // whether the paper is looked at, token by token, rather than written on
  editing: null, // the exchange whose message is being edited
  job: null, // what is being written now: {controller, writing}
  lost: null, // why the server does not answer, in words
  notice: "", // what the page has to say of what was just done …
  undo: null, // … and how it is taken back
};

const $ = (id) => document.getElementById(id);
const el = (tag, properties, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};
const button = (text, label, onclick) => el("button", { type: "button", textContent: text, ariaLabel: label, onclick });
/** Said anew only where it is new: what has not changed is not read out again, and a selection in it survives. */
const put = (node, text) => node.textContent !== text && (node.textContent = text);
/** Tell assistive technology once something is finished: a text that is still being written would only stammer. */
const say = (text) => put($("say"), text);
/** Browsers may forbid a page to remember anything, or much; that is no reason not to work. */
const keep = (where, name, value) => {
  try {
    window[where].setItem(name, value);
  } catch {
    return;
  }
};
const kept = (where, name) => {
  try {
    return window[where].getItem(name) ?? "";
  } catch {
    return "";
  }
};
const isChat = () => state.mode === "chat";

// ---------------------------------------------------------------------------------------------- the server, away and back

let wait = 1; // seconds until the next look, doubled each time
let timer = 0;

function lose(words) {
  state.lost = words;
  clearTimeout(timer);
  timer = setTimeout(connect, wait * 1000);
  wait = Math.min(2 * wait, 30);
  render();
}

/** See whether the server is there and ready, and which model it has, where that is not known for sure. */
async function connect() {
  clearTimeout(timer);
  try {
    const health = await fetch("health", { cache: "no-store", signal: AbortSignal.timeout(8000) });
    if (!health.ok) throw new Problem(await wordsOf(health));
  } catch (error) {
    return lose(error instanceof Problem ? error.message : UNREACHABLE);
  }
  if (state.lost === null && state.model) return;
  try {
    const { data: [{ id, nextword }] } = await (await request("v1/models")).json();
    if (!state.model && nextword?.chat === false && !state.exchanges.length) state.mode = "completion";
    state.model = { chat: true, ...nextword, id };
    document.title = `${id} · nextword`;
    if (state.lost) Object.assign(state, { notice: "The server is back. Nothing of yours was lost.", undo: null });
    state.lost = null;
    wait = 1;
    countTokens();
  } catch (error) {
    lose(error instanceof Problem ? error.message : "The server did not say which model it has.");
    if (error.key) clearTimeout(timer); // that is not asked again and again
  }
  render();
}

let asking = null; // the question for a key, one for all requests that wait for it

const askKey = () => asking ??= new Promise((resolve) => {
  const dialog = $("key-dialog");
  if (link.key) $("key-about").textContent = "The server did not accept the key.";
  Object.assign(dialog, { returnValue: "" }).showModal();
  dialog.addEventListener("close", () => {
    const given = dialog.returnValue === "use";
    if (given) link.key = $("key").value.trim();
    keep("sessionStorage", "nextword-key", given && $("key-keep").checked ? link.key : "");
    $("key").value = "";
    asking = null;
    resolve(given);
  }, { once: true });
});

// ---------------------------------------------------------------------------------------------- writing

const drawing = () => [...$("sampling").querySelectorAll("input[type=range], input[type=number]")];

/** The settings of how tokens are drawn; those that are empty are left to the model. */
function sampling() {
  return Object.fromEntries(drawing().filter(({ value }) => value !== "").map(({ name, value }) => [name, Number(value)]));
}

/** Whether the model can be asked now. Where a setting is wrong, it is shown with what is wrong. */
async function ready() {
  if (!$("sampling").checkValidity()) {
    openSettings();
    return $("sampling").reportValidity();
  }
  if (state.lost !== null) await connect();
  return state.lost === null; // what was written stays where it is until the server is back
}

/** Let the model write, and show it while it does. */
async function generate(path, body, writing) {
  const controller = new AbortController();
  const job = (state.job = { controller, writing });
  render(true);
  try {
    const response = await request(path, {
      body: { model: state.model?.id, ...body, ...sampling(), stream: true, stream_options: { include_usage: true } },
      signal: controller.signal,
      onWait: (note) => ((writing.note = note), render()),
    });
    writing.note = "";
    for await (const event of eventsOf(response)) {
      const choice = event.choices?.[0];
      if (choice) writing.add(choice.delta?.content ?? choice.text ?? "", tokensOf(choice));
      writing.finish = choice?.finish_reason ?? writing.finish;
      writing.usage = event.usage ?? writing.usage;
      framed ||= requestAnimationFrame(() => render());
    }
    writing.end("done");
  } catch (error) {
    const stopped = controller.signal.aborted;
    writing.end(stopped ? "stopped" : "failed", stopped ? "" : error instanceof Problem ? error.message : BROKEN);
    if (writing.note === BROKEN) connect(); // the server may be gone, which is then said
  }
  if (state.job === job) state.job = null;
  say(writing.note || `${writing.status === "stopped" ? "Stopped. " : ""}The model wrote: ${writing.text}`);
  countTokens(writing.usage?.total_tokens);
  const stopFocused = document.activeElement === $(isChat() ? "stop" : "text-stop");
  render();
  if (!stopFocused) return;
  // The button is gone: what was written is where the focus goes, and the arrow keys go through its tokens.
  [...document.querySelectorAll("#main section:not([hidden]) .model")].at(-1).focus();
  lookAway();
}

function stop() {
  state.job?.controller.abort();
  state.job = null;
}

/** Tell what is about to happen, and keep what it takes away for as long as it can be undone. */
function undoable(notice) {
  stop();
  const { exchanges, paper, reading } = state;
  const undo = () => {
    stop();
    Object.assign(state, { exchanges, paper, reading, editing: null, notice: "", undo: null });
    $("text").value = paperText();
    countTokens();
    render(true);
  };
  Object.assign(state, { notice, undo });
}

// ---------------------------------------------------------------------------------------------- conversation

/** The turns as the API and `nextword finetune` know them. What was not answered is left out, as `nextword chat` does it:
 * two turns of one role in a row are no conversation. */
function messagesOf(exchanges) {
  const system = $("system").value.trim();
  const turns = exchanges.filter(({ answer }) => answer.text.trim()).flatMap(({ asked, answer }) => [
    ...(asked === null ? [] : [{ role: "user", content: asked }]),
    { role: "assistant", content: answer.text },
  ]);
  return system ? [{ role: "system", content: system }, ...turns] : turns;
}

/** Say something after these exchanges. */
function ask(asked, before) {
  const exchange = { asked, answer: new Writing() };
  const messages = [...messagesOf(before), { role: "user", content: asked }];
  Object.assign(state, { exchanges: [...before, exchange], editing: null });
  generate("v1/chat/completions", { messages, logprobs: true, top_logprobs: ALTERNATIVES }, exchange.answer);
}

async function send() {
  const asked = $("draft").value.trim();
  if (!asked || state.job || !(await ready()) || state.job) return;
  $("draft").value = "";
  fitHeight($("draft"));
  Object.assign(state, { notice: "", undo: null });
  ask(asked, state.exchanges);
}

const before = (exchange) => state.exchanges.slice(0, state.exchanges.indexOf(exchange));

async function regenerate(exchange) {
  if (!(await ready())) return;
  undoable(exchange.answer.text ? "A new answer takes the place of the one before." : "");
  ask(exchange.asked, before(exchange));
  $("stop").focus();
}

function edit(exchange) {
  state.editing = exchange;
  render();
  views.get(exchange).node.querySelector("textarea").focus();
}

async function finishEdit(exchange, text) {
  if (text?.trim() && (await ready())) {
    undoable("The conversation goes on from the edited message.");
    ask(text.trim(), before(exchange));
  } else if (text === null) state.editing = null;
  else return;
  render();
  $("draft").focus();
}

// ---------------------------------------------------------------------------------------------- completion

const paperText = () => state.paper.map(({ text }) => text).join("");

/** The paper from what was written on it. What the model wrote stays the model's as far as it was left as it was. */
function takePaper() {
  if (state.reading) return;
  const text = $("text").value;
  const kept = [];
  let at = 0;
  for (const part of state.paper) {
    let same = 0;
    while (same < part.text.length && part.text[same] === text[at + same]) same++;
    if (same < part.text.length && /[\ud800-\udbff]/.test(part.text[same - 1])) same--; // not in the middle of a character
    if (same) kept.push(same === part.text.length ? part : part.upTo(same));
    at += same;
    if (same < part.text.length) break;
  }
  if (at < text.length) kept.push(Writing.plain(text.slice(at), true));
  state.paper = kept;
}

async function goOn() {
  if (state.job || !(await ready()) || state.job) return;
  takePaper();
  const prompt = paperText();
  if (!prompt.trim()) {
    Object.assign(state, { notice: "Write a beginning first: the model goes on from there.", undo: null });
    render();
    $("text").focus();
    return;
  }
  const writing = new Writing();
  Object.assign(state, { paper: [...state.paper, writing], reading: true });
  generate("v1/completions", { prompt, logprobs: ALTERNATIVES, truncate_prompt_tokens: -1 }, writing);
  $("reading").focus();
  lookAway();
}

async function tryAgain() {
  if (!(await ready())) return;
  undoable("A new continuation takes the place of the one before.");
  state.paper = state.paper.slice(0, -1);
  goOn();
}

function editPaper() {
  state.reading = false;
  $("text").value = paperText();
  render();
  $("text").focus();
  $("text").setSelectionRange($("text").value.length, $("text").value.length);
}

// ---------------------------------------------------------------------------------------------- render

let framed = 0; // the frame that renders, however many tokens come until then

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
  $("banner").hidden = state.lost === null;
  put($("banner-text"), state.lost ?? "");
  put($("notice-text"), state.notice);
  $("notice").classList.toggle("empty", !state.notice);
  $("undo").hidden = !state.notice || !state.undo;
  for (const id of ["send", "continue"]) $(id).hidden = state.job !== null;
  for (const id of ["stop", "text-stop"]) $(id).hidden = state.job === null;
  renderModel();
  if (isChat()) renderConversation();
  else renderPaper();
  place();
  if (follow || (atEnd && state.job)) page.scrollTop = page.scrollHeight;
}

function renderModel() {
  if (!state.model) return;
  const { id, chat, context_length: length, precision, task } = state.model;
  const facts = [length && `reads ${length.toLocaleString("en")} tokens`, precision, task].filter(Boolean);
  put($("model-name"), id);
  put($("model-facts"), facts.join(" · "));
  put($("hint"), chat ? "" : isChat()
    ? "This model was not taught to converse: expect it to go on with your words rather than to answer them."
    : "This model was not taught to converse. It goes on with a text: give it a beginning.");
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

function renderPaper() {
  const { paper, reading, job } = state;
  const last = paper.at(-1);
  $("text").hidden = $("text-name").hidden = reading;
  $("reading").hidden = $("text-edit").hidden = !reading;
  $("text-again").hidden = job !== null || !reading || !last || last.own;
  put($("text-note"), reading && last ? noteOf(last) : "");
  $("text-note").classList.toggle("failed", last?.status === "failed");
  if (!reading) return fitHeight($("text"));
  const boxes = [...$("reading").children];
  paper.forEach((part, i) => {
    if (boxes[i]?.part !== part) {
      const box = el("span", { part, className: part.own ? "own" : "" });
      if (boxes[i]) boxes[i].replaceWith(box);
      else $("reading").append(box);
      boxes[i] = box;
    }
    showWriting(boxes[i], part);
  });
  boxes.slice(paper.length).forEach((box) => box.remove());
}

/** A field as high as its text; page.css says where that ends. */
function fitHeight(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}

const bandOf = (p) => (p >= 0.9 ? "p0" : p >= 0.5 ? "p1" : p >= 0.2 ? "p2" : p >= 0.05 ? "p3" : "p4");

/** Show a writing in a box. Only the end of it ever grows, so what stands is left alone, and with it a selection in it. */
function showWriting(box, writing) {
  const rest = (box.rest ??= box.appendChild(el("span")));
  for (const piece of writing.pieces.slice(box.childElementCount - 1)) {
    const told = piece.tokens.filter(({ p }) => p !== null);
    // The probability of a piece is that of all its tokens, one after the other.
    const band = told.length ? bandOf(told.reduce((all, { p }) => all * p, 1)) : "";
    const span = el("span", { className: `token ${band}`, textContent: visible(piece.text), piece });
    if (!piece.text) span.dataset.mark = piece.tokens.map(({ name }) => name).join("");
    span.classList.toggle("newline", piece.text.includes("\n"));
    rest.before(span);
  }
  put(rest, visible(writing.rest));
  box.classList.toggle("writing", writing === state.job?.writing);
}

const noteOf = (writing) =>
  writing.note || (writing !== state.job?.writing ? writing.summary : writing.text ? "" : "The model is reading …");

const views = new WeakMap(); // exchange → {node, update}

function makeView(exchange) {
  const { asked, answer } = exchange;
  const question = el("div", { className: "asked text", dir: "auto", textContent: visible(asked ?? "") });
  const box = el("div", { className: "text model", dir: "auto" });
  const note = el("p", { className: "note" });
  const retry = button("Try again", "Try again to get an answer", () => regenerate(exchange));
  const again = button("Regenerate", "Regenerate this answer", () => regenerate(exchange));
  const forQuestion = el("div", { className: "actions quiet-actions" },
    button("Edit", "Edit this message", () => edit(exchange)),
    button("Copy", "Copy this message", ({ currentTarget }) => copy(asked, currentTarget)));
  const forAnswer = el("div", { className: "actions quiet-actions" },
    button("Copy", "Copy this answer", ({ currentTarget }) => copy(answer.text, currentTarget)), again);
  const you = el("div", { className: "you", hidden: asked === null },
    el("h2", { className: "unseen", textContent: "You" }), question, forQuestion);
  const node = el("li", { className: "exchange" }, you, el("h2", { className: "unseen", textContent: "The model" }), box,
    el("div", { className: "end" }, note, retry, forAnswer));
  let form = null;

  function update() {
    const busy = answer === state.job?.writing;
    const failed = answer.status === "failed";
    showWriting(box, answer);
    if (answer.pieces.length && box.tabIndex < 0) walkable(box, "Answer");
    box.ariaBusy = String(busy);
    box.hidden = !answer.text && !answer.pieces.length;
    put(note, noteOf(answer));
    note.classList.toggle("failed", failed);
    retry.hidden = !failed;
    forAnswer.hidden = busy || failed;
    again.hidden = asked === null; // there is nothing that it answers
    if ((state.editing === exchange) === (form !== null)) return;
    form?.remove();
    form = form ? null : you.appendChild(editForm(exchange));
    question.hidden = forQuestion.hidden = form !== null;
  }
  return { node, update };
}

function editForm(exchange) {
  const field = el("textarea", { value: exchange.asked, dir: "auto", ariaLabel: "The edited message", rows: 2 });
  const onsubmit = (event) => (event.preventDefault(), finishEdit(exchange, field.value));
  const sends = ({ key, shiftKey, isComposing }) => key === "Enter" && !shiftKey && !isComposing;
  field.addEventListener("keydown", (event) => sends(event) && onsubmit(event));
  return el("form", { className: "edit", onsubmit }, field, el("div", { className: "actions" },
    el("button", { type: "submit", className: "main", textContent: "Send again" }),
    button("Cancel", "Cancel the edit", () => finishEdit(exchange, null))));
}

// ---------------------------------------------------------------------------------------------- how much fits

let counting = 0;

/** Show how many tokens there are, of how many the model reads: as the server has told, or by asking it after a moment. */
function countTokens(known) {
  clearTimeout(counting);
  const room = state.model?.context_length;
  const show = (n) => {
    const [all, read] = [n, room ?? 0].map((number) => number.toLocaleString("en"));
    const over = n > room;
    // A text may be longer than what the model reads, which is its end; a conversation may not.
    const words = over && !isChat() ? `${all} tokens, of which the model reads the last ${read}` : `${all} of ${read} tokens`;
    put($("count"), !n ? "" : room ? words : `${all} tokens`);
    $("count").classList.toggle("over", over && isChat());
  };
  if (known) return void show(known);
  const draft = $("draft").value.trim();
  const messages = [...messagesOf(state.exchanges), ...(draft ? [{ role: "user", content: draft }] : [])];
  const prompt = isChat() ? messages.map(({ content }) => content).join("\n") : state.reading ? paperText() : $("text").value;
  if (!prompt) return void show(0);
  const body = { model: state.model?.id, ...(isChat() ? { messages } : { prompt }) };
  counting = setTimeout(async () => {
    if (state.lost !== null || state.job || !state.model) return;
    // Where it cannot be counted, that is not worth a word: what matters is said when something is sent.
    show(await request("tokenize", { body }).then((response) => response.json()).then(({ count }) => count, () => 0));
  }, 350);
}

// ---------------------------------------------------------------------------------------------- files

async function copy(text, from) {
  if (!(await navigator.clipboard?.writeText(text).then(() => true, () => false))) {
    // Without https, as on a phone in one's own network, there is only the old way.
    const field = document.body.appendChild(el("textarea", { value: text, className: "unseen" }));
    field.select();
    document.execCommand("copy");
    field.remove();
    from.focus();
  }
  from.textContent = "Copied";
  setTimeout(() => (from.textContent = "Copy"), 1200);
  say("Copied.");
}

function save() {
  takePaper();
  const messages = messagesOf(state.exchanges);
  const text = isChat() ? `${JSON.stringify({ messages })}\n` : paperText();
  if (isChat() ? messages.at(-1)?.role !== "assistant" : !text) {
    Object.assign(state, { notice: "There is nothing to save yet.", undo: null });
    return render();
  }
  const address = URL.createObjectURL(new Blob([text]));
  const when = new Date().toISOString().slice(0, 16).replace(/[T:]/g, "-");
  el("a", { href: address, download: isChat() ? `conversation-${when}.jsonl` : `text-${when}.txt` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** The exchanges of a file, its system message, and how many conversations it has: the last one is taken. */
function conversationOf(text) {
  const read = text.split("\n").flatMap((line, i) => {
    try {
      return line.trim() ? [JSON.parse(line)] : [];
    } catch {
      throw new Problem(`Line ${i + 1} is not JSON. A conversation is a line such as {"messages": [...]}.`);
    }
  });
  const messages = read.at(-1)?.messages;
  if (!Array.isArray(messages)) throw new Problem('The file has no line such as {"messages": [...]}.');
  const exchanges = [];
  let system = "";
  messages.forEach((message, i) => {
    const { role, content } = message ?? {};
    const last = exchanges.at(-1);
    if (typeof content !== "string") throw new Problem(`Message ${i + 1} has no text as its content.`);
    if (role === "system" && i === 0) system = content;
    else if (role === "user") exchanges.push({ asked: content, answer: Writing.plain("") });
    else if (role === "assistant" && last?.answer.text === "") last.answer.text = content;
    else if (role === "assistant") exchanges.push({ asked: null, answer: Writing.plain(content) });
    else throw new Problem(`Message ${i + 1} is of the role ${role}: there are user, assistant, and first of all system.`);
  });
  return { exchanges, system, conversations: read.length };
}

async function load(file) {
  const text = await file.text();
  try {
    if (isChat()) {
      const { exchanges, system, conversations } = conversationOf(text);
      const several = `Loaded the last of the file's ${conversations} conversations.`;
      undoable(conversations > 1 ? several : "The conversation was loaded.");
      Object.assign(state, { exchanges, editing: null });
      $("system").value = system;
    } else {
      takePaper();
      undoable("The text was loaded.");
      Object.assign(state, { paper: [Writing.plain(text, true)], reading: false });
      $("text").value = text;
    }
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    Object.assign(state, { notice: `The file could not be loaded. ${error.message}`, undo: null });
  }
  if ($("settings").matches(":modal")) $("settings").close();
  countTokens();
  render(true);
}

// A reload loses nothing: texts and settings are kept for this tab; probabilities are not.
function remember() {
  takePaper();
  const fields = [...$("sampling").querySelectorAll("[name]")].map(({ id, value }) => [id, value]);
  const exchanges = state.exchanges.map(({ asked, answer }) => [asked, answer.text]);
  fields.push(["text", paperText()], ["draft", $("draft").value]);
  keep("sessionStorage", "nextword", JSON.stringify({ mode: state.mode, exchanges, fields, plain: !$("underline").checked }));
}

function recall() {
  document.documentElement.dataset.theme = kept("localStorage", "nextword-theme");
  link.key = kept("sessionStorage", "nextword-key");
  const before = kept("sessionStorage", "nextword");
  if (!before) return;
  const { mode, exchanges, fields, plain } = JSON.parse(before);
  Object.assign(state, { mode, exchanges: exchanges.map(([asked, answer]) => ({ asked, answer: Writing.plain(answer) })) });
  for (const [id, value] of fields) if ($(id)) $(id).value = value;
  $("underline").checked = !plain;
  takePaper();
}

// ---------------------------------------------------------------------------------------------- what people do

function openSettings() {
  if ($("settings").open) return;
  if (WIDE.matches) $("settings").show();
  else $("settings").showModal();
  $("open-settings").ariaExpanded = "true";
}

/** The event comes a moment after the dialog is gone: who has gone on to another field by then is left there. */
function settingsClosed() {
  $("open-settings").ariaExpanded = "false";
  if (document.activeElement === document.body) $("open-settings").focus();
}

function showSettings() {
  for (const output of document.querySelectorAll("output")) put(output, $(output.htmlFor.value).value);
  document.body.classList.toggle("plain", !$("underline").checked);
}

function setMode(mode) {
  stop();
  Object.assign(state, { mode, notice: "", undo: null, editing: null });
  countTokens();
  render();
}

function startAnew() {
  takePaper();
  if (isChat() ? state.exchanges.length : state.paper.length) undoable(isChat() ? "A new conversation." : "A new text.");
  Object.assign(state, isChat() ? { exchanges: [], editing: null } : { paper: [], reading: false });
  if (!isChat()) $("text").value = "";
  countTokens();
  render();
  $(isChat() ? "draft" : "text").focus();
}

function switchTheme() {
  const { dataset } = document.documentElement;
  const dark = dataset.theme ? dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  keep("localStorage", "nextword-theme", (dataset.theme = dark ? "light" : "dark"));
}

function onKey(event) {
  const { target, key } = event;
  if (event.isComposing) return; // Enter and Esc belong to the input method then
  if (key === "Escape" && !document.querySelector("dialog:modal")) {
    lookAway();
    if (state.job) $(isChat() ? "stop" : "text-stop").click();
    else if (state.editing) finishEdit(state.editing, null);
  } else if (key === "Enter" && target === $("draft") && !event.shiftKey) {
    event.preventDefault();
    send();
  } else if (key === "ArrowUp" && target === $("draft") && !target.value && !state.job) {
    const last = state.exchanges.findLast(({ asked }) => asked !== null);
    if (last) (event.preventDefault(), edit(last));
  } else if (key === "Enter" && (event.ctrlKey || event.metaKey) && !isChat()) {
    event.preventDefault();
    goOn();
  }
}

function listen() {
  const on = (id, type, act) => $(id).addEventListener(type, act);
  const press = (id, act) => on(id, "click", () => act());
  on("composer", "submit", (event) => (event.preventDefault(), send()));
  press("stop", () => (stop(), $("draft").focus()));
  press("text-stop", () => (stop(), $("reading").focus(), lookAway()));
  press("mode-chat", () => (takePaper(), setMode("chat")));
  press("mode-completion", () => setMode("completion"));
  press("new", startAnew);
  press("continue", goOn);
  press("text-again", tryAgain);
  press("text-edit", () => (stop(), editPaper()));
  on("text-copy", "click", ({ currentTarget }) => (takePaper(), copy(paperText(), currentTarget)));
  press("undo", () => (state.undo(), $(isChat() ? "draft" : "new").focus()));
  press("banner-retry", connect);
  press("open-settings", () => ($("settings").open ? $("settings").close() : openSettings()));
  press("close-settings", () => $("settings").close());
  on("settings", "close", settingsClosed);
  WIDE.addEventListener("change", () => $("settings").close());
  on("sampling", "input", showSettings);
  press("defaults", () => (drawing().forEach((field) => (field.value = field.defaultValue)), showSettings()));
  on("sampling", "submit", (event) => event.preventDefault()); // Enter in a field does not close the settings
  press("save", save);
  press("load", () => $("file").click());
  on("file", "change", () => ($("file").files[0] && load($("file").files[0]), ($("file").value = "")));
  press("theme", switchTheme);
  for (const id of ["draft", "text"]) on(id, "input", () => (fitHeight($(id)), countTokens()));
  document.addEventListener("keydown", onKey);
  addEventListener("pagehide", remember);
  addEventListener("online", connect);
  // A server that goes away is noticed before the next message is written.
  const look = () => !document.hidden && !state.job && state.lost === null && connect();
  document.addEventListener("visibilitychange", look);
  setInterval(look, 20_000);
}

Object.assign(link, { askKey, lost: lose });
recall();
listen();
listenToLooks(say);
walkable($("reading"), "The text");
showSettings();
if (WIDE.matches) openSettings();
render();
$(isChat() ? "draft" : "text").focus();
connect();
