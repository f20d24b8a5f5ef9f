// The page: takes an image, asks the service about it, and shows what it answers. Nothing is kept.

import { events, get, onToken, post, Problem } from "./api.js";
import { Entry, showAbout } from "./answers.js";
import * as viewer from "./viewer.js";

const $ = (id) => document.getElementById(id);
const KEYS = "Enter asks, Esc stops.";
const STOPPED = "AbortError";

let turn = Promise.resolve(); // the end of all questions asked so far: one at a time
let image = new AbortController(); // is aborted when another image comes
let running = null; // what Esc stops
let lastMap = null; // [location, frame]
let noLocating = "The models are not known yet.";

// ---- the image

async function take(file) {
  if (!file) return;
  image.abort();
  image = new AbortController();
  lastMap = null;
  $("answers").replaceChildren(); // answers about another image must not stand beside this one
  if (!(await viewer.open(file))) return;
  say("Image shown.");
  if (!matchMedia("(pointer: coarse)").matches) $("question").focus(); // else a keyboard would cover it
}

for (const id of ["drop", "choose"]) $(id).addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  take($("file").files[0]);
  $("file").value = "";
});
for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(type, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dragging", type === "dragenter" || type === "dragover");
    if (type === "drop") take(event.dataTransfer.files[0]);
  });
}

addEventListener("frame", () => showAbout(frameOf(viewer.shown())));

// ---- questions

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  begin(askOne);
});

$("locate").addEventListener("click", () => {
  if (noLocating) hint(noLocating, true);
  else begin(locateOne);
});

$("heat-toggle").addEventListener("click", () => {
  const visible = $("heat-toggle").getAttribute("aria-pressed") === "true";
  viewer.showHeat(visible ? null : lastMap[0], lastMap[1]);
});

addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("token-dialog").open) running?.abort();
});

function begin(work) {
  const question = $("question").value.trim();
  const fields = viewer.shown();
  if (!fields || !question) {
    hint(fields ? "Write a question first." : "Open an image first.", true);
    (fields ? $("question") : $("drop")).focus();
    return;
  }
  $("question").value = "";
  hint();
  enter(work, question, fields);
}

function enter(work, question, fields) {
  const entry = new Entry(question, frameOf(fields));
  const { signal: left } = image;
  turn = turn.then(async () => {
    if (left.aborted) return;
    running = new AbortController();
    const signal = AbortSignal.any([running.signal, left]);
    const busy = (seconds) => entry.waits(`The service is busy. Trying again in ${seconds} s.`);
    try {
      entry.waits("Asking.");
      say(await work(entry, question, fields, { signal, busy }));
    } catch (error) {
      if (left.aborted) return;
      if (error.name === STOPPED) return entry.stopped();
      entry.problem(error, () => enter(work, question, fields));
      say(`${error.message} ${error.remedy ?? ""}`);
    } finally {
      running = null;
    }
  });
}

async function askOne(entry, question, fields, how) {
  const response = await post("/v1/ask", { ...fields, question, yes_no: true, stream: true }, how);
  let said = "";
  for await (const [name, data] of events(response)) {
    if (name === "token") entry.token(data.text);
    else if (name === "answer") said = entry.answer(data, frameOf(fields));
    else if (name === "error") throw new Problem(data.error.message, data.error.remedy);
    else if (name === "done") return said;
  }
  throw new Problem("The answer broke off.", "Ask again.");
}

async function locateOne(entry, phrase, fields, how) {
  const found = await (await post("/v1/locate", { ...fields, phrase }, how)).json();
  const show = () => viewer.showHeat(...(lastMap = [found, fields.frame]));
  await show();
  return entry.location(found, frameOf(fields), show);
}

const frameOf = ({ frame }) => (frame === undefined ? "" : String(frame + 1));

// ---- what the service is

async function describe() {
  try {
    const { data } = await (await get("/v1/models")).json();
    const [answering] = data;
    $("model").textContent = `${answering.id} · ${answering.sha256.slice(0, 12)} · verification ${answering.verification}`;
    const locating = data.some((model) => model.kind === "medmoe");
    noLocating = locating ? "" : "Locate needs a modality model: start the service with --modality-model.";
    $("locate").setAttribute("aria-disabled", String(!locating));
    hint();
  } catch (error) {
    hint(`${error.message} ${error.remedy ?? ""}`, true);
  }
}

function hint(text = noLocating ? `${KEYS} ${noLocating}` : `${KEYS} Locate shows where the words fit best.`, urgent = false) {
  $("hint").textContent = text;
  $("hint").classList.toggle("problem", urgent);
  if (urgent) say(text);
}

function say(text) {
  $("announce").textContent = text;
}

// ---- the token

onToken(async (why) => {
  const dialog = $("token-dialog");
  $("token-problem").textContent = why;
  $("token").value = dialog.returnValue = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  const given = dialog.returnValue === "given" ? $("token").value.trim() : null;
  $("token").value = "";
  return given || null;
});
$("token-dialog").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("token-dialog").close("given");
});
$("token-cancel").addEventListener("click", () => $("token-dialog").close(""));

describe();
