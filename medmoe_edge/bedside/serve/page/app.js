// The page: takes images, asks the service about them, and shows what it answers. What it knows is gone
// with the tab.

import { Entry, showAbout } from "./answers.js";
import { events, get, onToken, post, Problem } from "./api.js";
import { copy, linesOf, save } from "./export.js";
import { entries, onShow, recordOf, remember, thumbOf } from "./history.js";
import { language, preferred, speak, words } from "./language.js";
import { LANGUAGES, QUESTIONS } from "./texts.js";
import * as viewer from "./viewer.js";

const $ = (id) => document.getElementById(id);
const STOPPED = "AbortError";

let turn = Promise.resolve(); // the end of all questions asked so far: one at a time
let leaving = new AbortController(); // is aborted when another image comes
let image = null; // what the history keeps of the files that are shown
let running = null; // what Esc stops
let lastMap = null; // [location, key of its slice]
let answering = null; // the model, as the service tells of it
let noLocating = "hint.models"; // why not, a key of the catalogue

// ---- the image

async function take(files, record = recordOf([...files]), key) {
  if (!record.files.length) return;
  leaving.abort();
  leaving = new AbortController();
  lastMap = null;
  image = record;
  $("answers").replaceChildren(); // answers about another image must not stand beside this one
  if (!(await viewer.open(record.files, key))) return;
  $("answers").replaceChildren(...record.entries.map(({ entry }) => entry.root));
  turned();
  say(words("shown"));
  if (!matchMedia("(pointer: coarse)").matches) $("question").focus(); // else a keyboard would cover it
}

for (const id of ["drop", "choose"]) $(id).addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  take($("file").files);
  $("file").value = "";
});
for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
  addEventListener(type, async (event) => {
    event.preventDefault();
    document.body.classList.toggle("dragging", type === "dragenter" || type === "dragover");
    if (type === "drop") take(await dropped(event.dataTransfer));
  });
}
addEventListener("paste", ({ clipboardData }) => take(clipboardData.files));

/** The files that were dropped, and those in folders. */
async function dropped({ items, files }) {
  const found = [...items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!found.some((entry) => entry.isDirectory)) return files;
  return (await Promise.all(found.map(filesIn))).flat();
}

async function filesIn(entry) {
  if (entry.isFile) return [await new Promise((resolve, reject) => entry.file(resolve, reject))];
  const [reader, inside] = [entry.createReader(), []];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return (await Promise.all(inside.map(filesIn))).flat();
    inside.push(...some);
  }
}

addEventListener("slice", turned);
addEventListener("forgotten", () => {
  if (image) image.entries = [];
  turned();
});

function turned() {
  showAbout(viewer.about()?.key);
  offerExamples();
  $("empty").hidden = Boolean($("answers").querySelector(":scope > :not([hidden])"));
}

onShow(async (record, key) => {
  if (record !== image) await take(record.files, record, key);
  else await viewer.turnToKey(key);
});

// ---- questions

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  begin(askOne);
});

$("locate").addEventListener("click", () => {
  if (noLocating) hint(words(noLocating), true);
  else begin(locateOne);
});

$("heat-toggle").addEventListener("click", () => {
  const visible = $("heat-toggle").getAttribute("aria-pressed") === "true";
  viewer.showHeat(visible ? null : lastMap[0], lastMap[1]);
});

addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.abort();
});

function begin(work) {
  const question = $("question").value.trim();
  const fields = viewer.shown();
  if (!fields || !question) {
    hint(words(fields ? "hint.question" : "hint.image"), true);
    (fields ? $("question") : $("drop")).focus();
    return;
  }
  $("question").value = "";
  hint();
  enter(work, { question, fields, about: viewer.about(), thumb: thumbOf($("picture")) });
}

/** `asked` is what the question is about, as it was when the question was entered. */
function enter(work, asked) {
  const { question, fields, about, thumb } = asked;
  const entry = new Entry(question, about);
  const { signal: left } = leaving;
  const record = image;
  turned();
  turn = turn.then(async () => {
    if (left.aborted) return;
    running = new AbortController();
    const signal = AbortSignal.any([running.signal, left]);
    const busy = (seconds) => entry.waits("busy", { seconds });
    try {
      entry.waits("asking");
      const said = await work(entry, question, fields, { signal, busy });
      remember(record, entry, thumb);
      say(said);
    } catch (error) {
      if (left.aborted) return;
      if (error.name === STOPPED) return entry.stopped();
      entry.problem(error, () => enter(work, asked));
      say(`${error.message} ${error.remedy ?? ""}`);
    } finally {
      running = null;
    }
  });
}

async function askOne(entry, question, fields, how) {
  const response = await post("/v1/ask", { ...fields, question, yes_no: true, stream: true }, how);
  let said = "";
  entry.actions = takeAway(entry);
  for await (const [name, data] of events(response)) {
    if (name === "token") entry.token(data.text);
    else if (name === "answer") said = entry.answer(data);
    else if (name === "error") throw new Problem(data.error.message, data.error.remedy);
    else if (name === "done") return said;
  }
  throw new Problem(words("broke.off"), words("ask.again"));
}

async function locateOne(entry, phrase, fields, how) {
  const found = await (await post("/v1/locate", { ...fields, phrase }, how)).json();
  const show = () => viewer.showHeat(...(lastMap = [found, entry.about.key]));
  entry.actions = [["map.show", show], ...takeAway(entry, found)];
  await show();
  return entry.location(found);
}

/** What can be done with an answer, and its map if it has one; it is only seen beside its own slice. */
function takeAway(entry, location = null) {
  const lines = () => linesOf({ ...entry, about: viewer.about() }, entry.line());
  const savePicture = async () => {
    const said = lines(); // of the slice that is shown now, as its picture is
    await save(await viewer.layers(location), entry.about.picture.sides, said);
    say(words("export.done"), true);
  };
  return [
    ["copy", async () => say(words((await copy(lines())) ? "copy.done" : "copy.failed"), true)],
    ["export", savePicture],
  ];
}

// ---- examples

function offerExamples() {
  const questions = QUESTIONS[viewer.about()?.picture.modality] ?? QUESTIONS.other;
  const at = Object.keys(LANGUAGES).indexOf(language());
  const rows = questions.map((texts) => {
    const [row, button] = [document.createElement("li"), document.createElement("button")];
    button.type = "button";
    button.append(Object.assign(document.createElement("span"), { textContent: texts[0], lang: "en" }));
    if (at) button.append(" ", Object.assign(document.createElement("small"), { textContent: texts[at] }));
    button.addEventListener("click", () => {
      $("question").value = texts[0];
      openExamples(false);
      begin(askOne);
    });
    row.append(button);
    return row;
  });
  $("examples").querySelector("ul").replaceChildren(...rows);
}

function openExamples(open) {
  $("examples").hidden = !open;
  $("examples-toggle").setAttribute("aria-expanded", String(open));
}

$("examples-toggle").addEventListener("click", () => openExamples($("examples").hidden));

// ---- what the service is

async function describe() {
  try {
    const { data } = await (await get("/v1/models")).json();
    [answering] = data;
    noLocating = data.some((model) => model.kind === "medmoe") ? "" : "hint.no.model";
    $("locate").setAttribute("aria-disabled", String(Boolean(noLocating)));
    tellModel();
  } catch (error) {
    hint(`${error.message} ${error.remedy ?? ""}`, true);
  }
}

function tellModel() {
  if (!answering) return;
  const { id: name, sha256, verification, audited } = answering;
  $("model").textContent = words("model", { name, hash: sha256.slice(0, 12), verification });
  $("kept").textContent = words(audited ? "kept.audit" : "kept.none");
  hint();
}

function hint(text = `${words("hint.keys")} ${words(noLocating || "hint.locate")}`, urgent = false) {
  $("hint").textContent = text;
  $("hint").classList.toggle("problem", urgent);
  if (urgent) say(text);
}

/** Have it read aloud; `seen` also puts it where it is seen. */
function say(text, seen = false) {
  $("announce").textContent = text;
  if (seen) $("hint").textContent = text;
}

// ---- the language

$("language").append(
  ...Object.entries(LANGUAGES).map(([value, textContent]) => Object.assign(document.createElement("option"), { value, textContent, lang: value })),
);
$("language").addEventListener("change", () => {
  history.replaceState(null, "", `#${$("language").value}`); // so that a bookmark keeps it
  speak($("language").value);
});
addEventListener("language", () => {
  $("language").value = language();
  for (const entry of entries()) entry.translate();
  hint();
  tellModel();
  turned();
});

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

speak(preferred());
describe();
