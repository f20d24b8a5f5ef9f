// Shows the picture: as the model sees it, or in another window; slice by slice; under a heat map.

import { named } from "./answers.js";
import { post } from "./api.js";
import { showBanner, sidesLine } from "./banner.js";
import { paintHeat } from "./heat.js";
import { words } from "./language.js";
import { Stack } from "./stack.js";
import { fit, onWindow } from "./zoom.js";

const $ = (id) => document.getElementById(id);
const canvas = $("picture");
const DRAG = 200; // pixels of the screen that double the width of a window
// Centre and width in HU, as they are commonly chosen for CT.
const PRESETS = { brain: [40, 80], soft: [40, 400], lung: [-600, 1500], bone: [400, 1800], liver: [60, 160] };

let stack = null; // what was opened
let slice = null; // which of it is on the screen
let picture = null; // what /v1/picture told of it
let bitmap = null; // as the model sees it
let view = null; // { centre, width } of the display; null is the file's own
let loading = new AbortController();

/** What is on the screen, for a question about it: the fields of a form, null where there is none. */
export function shown() {
  return slice && { image: slice.file, ...(slice.frames > 1 && { frame: slice.frame }) };
}

/** Which slice is on the screen: its key, and what it is called where there are several. */
export function about() {
  if (!slice) return null;
  const several = stack.files.length > 1 || slice.frames > 1;
  const name = slice.frames > 1 ? slice.frame + 1 : (slice.instance ?? stack.slices.indexOf(slice) + 1);
  return { key: slice.key, name: several ? String(name) : "", picture, windowed: view !== null };
}

/** The picture as it is shown now, and over it this map, if any, whichever is on the screen; and the map's scale. */
export async function layers(location) {
  const image = createImageBitmap(canvas);
  if (!location) return { layers: [await image] };
  const heat = document.createElement("canvas");
  const scale = await paintHeat(heat, location, picture);
  return { layers: [await image, heat], scale };
}

/** Show files: the slice of this key, or the middle one. Whether it could. */
export async function open(files, key) {
  loading.abort();
  stack?.close();
  slice = picture = view = null;
  hideAll();
  fit();
  $("stage").setAttribute("aria-busy", "true");
  const mine = (stack = new Stack(files, busy, () => stack === mine && count()));
  try {
    const first = await mine.open(key);
    return stack === mine && (await load(first));
  } catch (error) {
    if (stack !== mine) return false;
    $("stage").removeAttribute("aria-busy");
    tell(`${error.message} ${error.remedy ?? ""}`);
    return false;
  }
}

/** Show the slice of this key. Whether it could. */
export async function turnToKey(key) {
  const found = stack.slices.find((one) => one.key === key);
  return Boolean(found) && (found === slice || (await load(found)));
}

/** Lay a map over the slice that it was made of; null takes it away. */
export async function showHeat(location, key = slice.key) {
  if (location && !(await turnToKey(key))) return;
  hideSeen();
  if (location) await paintHeat($("heat"), location, picture);
  $("heat").hidden = $("legend").hidden = !location;
  $("heat-toggle").hidden = false;
  $("heat-toggle").setAttribute("aria-pressed", String(Boolean(location)));
}

/** Show exactly what the model sees of the picture, at its resolution; again takes it away. */
async function toggleSeen() {
  if (!$("seen").hidden) return hideSeen();
  const { signal } = loading;
  try {
    const response = await post("/v1/seen", shown(), { signal, busy });
    const url = URL.createObjectURL(await response.blob());
    $("seen").src = url;
    await $("seen").decode().finally(() => URL.revokeObjectURL(url));
    if (signal.aborted) return;
    const { naturalWidth: width, naturalHeight: height } = $("seen");
    $("seen").alt = words("seen.shown", { width, height });
    $("seen").hidden = false;
    $("seen-toggle").setAttribute("aria-pressed", "true");
    tell("");
  } catch (error) {
    if (!signal.aborted) tell(`${error.message} ${error.remedy ?? ""}`);
  }
}

function hideSeen() {
  $("seen").hidden = true;
  $("seen").removeAttribute("src");
  $("seen-toggle").setAttribute("aria-pressed", "false");
}

$("seen-toggle").addEventListener("click", toggleSeen);

function hideAll() {
  hideSeen();
  showBanner(null); // or another patient's would stay
  for (const id of ["picture", "layers", "heat", "legend", "display-only", "heat-toggle", "tools"]) $(id).hidden = true;
}

async function load(wanted) {
  loading.abort();
  loading = new AbortController();
  const { signal } = loading;
  $("stage").setAttribute("aria-busy", "true");
  tell("");
  try {
    const found = await stack.picture(wanted, signal);
    const decoded = await createImageBitmap(found.png);
    if (signal.aborted) return false;
    [slice, picture, bitmap] = [wanted, found, decoded];
    tell("");
    arrange();
    dispatchEvent(new Event("slice")); // another one is shown
    return true;
  } catch (error) {
    if (signal.aborted) return false;
    if (picture) arrange(); // the slider had gone ahead
    tell(`${error.message} ${error.remedy ?? ""}`);
    return false;
  } finally {
    if (!signal.aborted) $("stage").removeAttribute("aria-busy");
  }
}

const busy = (seconds) => tell(words("busy", { seconds }));

function tell(problem) {
  $("picture-problem").textContent = problem;
  $("picture-problem").hidden = !problem;
  $("drop").hidden = picture !== null;
}

function arrange() {
  [canvas.width, canvas.height] = [picture.width, picture.height];
  canvas.hidden = $("layers").hidden = $("tools").hidden = false;
  const [columns, rows] = picture.size;
  $("facts").textContent = [`${columns} × ${rows}`, picture.modality && named(picture.modality)].filter(Boolean).join(" · ");
  $("window").hidden = !picture.codes;
  $("heat").hidden = $("legend").hidden = $("heat-toggle").hidden = true;
  hideSeen();
  showBanner(picture);
  offerPresets();
  count();
  draw();
}

/** What of the display depends on how many slices there are. */
function count() {
  if (!picture) return;
  const [at, all] = [stack.slices.indexOf(slice) + 1, stack.slices.length];
  const left = stack.missing ? ` (${words("reading", { left: stack.missing })})` : "";
  $("frames").hidden = all < 2;
  $("frame").max = all - 1;
  $("frame").value = at - 1;
  $("frame-shown").value = `${at} / ${all}${left}`;
  const [columns, rows] = picture.size;
  const parts = [words("picture", { columns, rows }), sidesLine(picture)];
  if (all > 1) parts.push(words("picture.frame", { at, all }));
  canvas.setAttribute("aria-label", parts.filter(Boolean).join(", "));
  const said = picture.warnings.map(({ message }) => message);
  if (stack.leftOut) said.push(words("left.out", { count: stack.leftOut }));
  if (stack.unread) said.push(words("unread", { count: stack.unread }));
  $("picture-warnings").textContent = said.join(" ");
  $("picture-warnings").hidden = !said.length;
}

// ---- the window

function offerPresets() {
  const names = ["own", "full", ...(picture.modality === "ct" ? Object.keys(PRESETS) : []), "free"];
  $("preset").replaceChildren(
    ...names.map((name) => Object.assign(document.createElement("option"), { value: name, textContent: words(`preset.${name}`) })),
  );
  $("preset").lastChild.disabled = true; // it says that none of the others is chosen
}

function draw() {
  const context = canvas.getContext("2d");
  $("display-only").hidden = !view;
  $("reset").disabled = !view;
  canvas.classList.toggle("windowed", Boolean(picture.codes));
  if (picture.codes) {
    const { centre, width } = view ?? own();
    if (document.activeElement !== $("centre")) $("centre").value = rounded(centre, width);
    if (document.activeElement !== $("width")) $("width").value = rounded(width, width);
    $("preset").value = view ? (view.preset ?? "free") : "own";
  }
  if (!view || !picture.codes) return context.drawImage(bitmap, 0, 0);
  const [levels, codes] = [greys(), picture.codes.data];
  const shades = context.createImageData(picture.width, picture.height);
  const pixels = new Uint32Array(shades.data.buffer);
  for (let at = 0; at < pixels.length; at += 1) pixels[at] = levels[codes[at]];
  context.putImageData(shades, 0, 0);
}

/** The colour of every code in the window, LINEAR_EXACT of DICOM PS3.3 C.11.2.1.3.2. */
function greys() {
  const { offset, scale, inverted } = picture.codes;
  const levels = new Uint32Array(65536);
  for (let code = 0; code < levels.length; code += 1) {
    const share = (offset + scale * code - view.centre) / view.width + 0.5;
    const grey = Math.round(255 * Math.min(Math.max(inverted ? 1 - share : share, 0), 1));
    levels[code] = 0xff000000 | (grey * 0x010101);
  }
  return levels;
}

function own() {
  const [centre, width] = picture.codes.window;
  return { centre, width };
}

/** From the lowest value of the picture to the highest. */
function full() {
  const { offset, scale, data } = picture.codes;
  let [low, high] = [65535, 0];
  for (const code of data) [low, high] = [Math.min(low, code), Math.max(high, code)];
  return [offset + (scale * (low + high)) / 2, scale * (high - low)];
}

const rounded = (value, width) => Number(width > 20 ? value.toFixed(0) : value.toPrecision(3));

function look(centre, width, preset) {
  const span = picture.codes.window[1];
  view = { centre, width: Math.max(width, span / 255), preset };
  draw();
}

onWindow(() => {
  if (!picture?.codes) return null;
  const { centre, width } = view ?? own();
  const step = own().width / DRAG;
  return (right, down) => look(centre + down * step, width + right * step);
});

$("preset").addEventListener("change", () => {
  const name = $("preset").value;
  if (name === "own") view = null;
  else look(...(PRESETS[name] ?? full()), name);
  draw();
});

for (const id of ["centre", "width"]) {
  $(id).addEventListener("input", () => {
    const [centre, width] = [$("centre").valueAsNumber, $("width").valueAsNumber];
    if (Number.isFinite(centre) && width > 0) look(centre, width);
  });
  $(id).addEventListener("change", draw);
}

$("reset").addEventListener("click", () => {
  view = null;
  draw();
  $("centre").focus();
});

// ---- the slices

let soon = 0;
function turnTo(at) {
  const wanted = Math.min(Math.max(at, 0), stack.slices.length - 1);
  $("frame").value = wanted;
  $("frame-shown").value = `${wanted + 1} / ${stack.slices.length}`;
  clearTimeout(soon);
  const found = stack.slices[wanted];
  if (found.picture) load(found);
  else soon = setTimeout(() => load(found), 60);
}

$("frame").addEventListener("input", () => turnTo($("frame").valueAsNumber));
$("stage").addEventListener(
  "wheel",
  (event) => {
    if (picture && !event.ctrlKey && stack.slices.length > 1) turnTo($("frame").valueAsNumber + Math.sign(event.deltaY));
  },
  { passive: true },
);

addEventListener("language", () => picture && (showBanner(picture), offerPresets(), count(), draw()));
