// Shows the picture: as the model sees it, or in another window; frame by frame; under a heat map.

import { named } from "./answers.js";
import { bytes, post } from "./api.js";
import { paintHeat } from "./heat.js";

const $ = (id) => document.getElementById(id);
const canvas = $("picture");
const DRAG = 200; // pixels of the screen that double the width of a window

let file = null;
let picture = null; // what /v1/picture told
let bitmap = null; // as the model sees it
let codes = null; // the values behind it, where it is grey
let view = null; // { centre, width } of the display; null is the file's own
let loading = new AbortController();

/** What is on the screen, for a question about it: the fields of a form, null where there is none. */
export function shown() {
  return picture && { image: file, ...(picture.frames > 1 && { frame: picture.frame }) };
}

/** Show a file's middle frame. Whether it could. */
export async function open(chosen) {
  file = chosen;
  view = picture = null;
  hideAll();
  return await load(null);
}

/** Lay a map over the frame that it was made of; null takes it away. */
export async function showHeat(location, frame = picture.frame) {
  if (location && frame !== picture.frame && !(await load(frame))) return;
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
  const busy = (left) => tell(`The service is busy. Trying again in ${left} s.`);
  try {
    const response = await post("/v1/seen", shown(), { signal, busy });
    const url = URL.createObjectURL(await response.blob());
    $("seen").src = url;
    await $("seen").decode().finally(() => URL.revokeObjectURL(url));
    if (signal.aborted) return;
    const { naturalWidth: width, naturalHeight: height } = $("seen");
    $("seen").alt = `Exactly what the model sees, ${width} by ${height} pixels`;
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
  for (const id of ["picture", "heat", "legend", "display-only", "heat-toggle", "tools"]) $(id).hidden = true;
}

async function load(frame) {
  loading.abort();
  loading = new AbortController();
  const { signal } = loading;
  $("stage").setAttribute("aria-busy", "true");
  tell("");
  try {
    const fields = { image: file, ...(frame !== null && { frame }) };
    const busy = (left) => tell(`The service is busy. Trying again in ${left} s.`);
    const found = await (await post("/v1/picture", fields, { signal, busy })).json();
    const decoded = await createImageBitmap(new Blob([bytes(found.png)], { type: "image/png" }));
    if (signal.aborted) return false;
    [picture, bitmap] = [found, decoded];
    codes = found.codes && new Uint16Array(bytes(found.codes.data).buffer);
    tell("");
    arrange();
    dispatchEvent(new Event("frame")); // another one is shown
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

function tell(problem) {
  $("picture-problem").textContent = problem;
  $("picture-problem").hidden = !problem;
  $("drop").hidden = picture !== null;
}

function arrange() {
  [canvas.width, canvas.height] = [picture.width, picture.height];
  canvas.hidden = $("tools").hidden = false;
  const [columns, rows] = picture.size;
  const frame = picture.frames > 1 ? `, frame ${picture.frame + 1} of ${picture.frames}` : "";
  canvas.setAttribute("aria-label", `Image, ${columns} by ${rows} pixels${frame}`);
  $("facts").textContent = [`${columns} × ${rows}`, picture.modality && named(picture.modality)].filter(Boolean).join(" · ");
  $("picture-warnings").textContent = picture.warnings.map(({ message }) => message).join(" ");
  $("picture-warnings").hidden = !picture.warnings.length;
  $("frames").hidden = picture.frames < 2;
  $("frame").max = picture.frames - 1;
  $("frame").value = picture.frame;
  $("frame-shown").value = `${picture.frame + 1} / ${picture.frames}`;
  $("window").hidden = !codes;
  $("heat").hidden = $("legend").hidden = $("heat-toggle").hidden = true;
  hideSeen();
  draw();
}

function draw() {
  const context = canvas.getContext("2d");
  $("display-only").hidden = !view;
  $("reset").disabled = !view;
  canvas.classList.toggle("windowed", Boolean(codes));
  if (codes) {
    const { centre, width } = view ?? own();
    if (document.activeElement !== $("centre")) $("centre").value = rounded(centre, width);
    if (document.activeElement !== $("width")) $("width").value = rounded(width, width);
  }
  if (!view) return context.drawImage(bitmap, 0, 0);
  const levels = greys();
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

const rounded = (value, width) => Number(width > 20 ? value.toFixed(0) : value.toPrecision(3));

function look(centre, width) {
  const span = picture.codes.window[1];
  view = { centre, width: Math.max(width, span / 255) };
  draw();
}

canvas.addEventListener("pointerdown", (start) => {
  if (!codes || start.button !== 0) return;
  const { centre, width } = view ?? own();
  const step = own().width / DRAG;
  const drag = (at) =>
    look(centre + (at.clientY - start.clientY) * step, width + (at.clientX - start.clientX) * step);
  canvas.setPointerCapture(start.pointerId);
  canvas.addEventListener("pointermove", drag);
  const end = () => canvas.removeEventListener("pointermove", drag);
  canvas.addEventListener("lostpointercapture", end, { once: true });
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

let soon = 0;
function turnTo(frame) {
  const wanted = Math.min(Math.max(frame, 0), picture.frames - 1);
  $("frame").value = wanted;
  $("frame-shown").value = `${wanted + 1} / ${picture.frames}`;
  clearTimeout(soon);
  soon = setTimeout(() => load(wanted), 60);
}

$("frame").addEventListener("input", () => turnTo($("frame").valueAsNumber));
$("stage").addEventListener(
  "wheel",
  (event) => {
    if (picture?.frames > 1) turnTo($("frame").valueAsNumber + Math.sign(event.deltaY));
  },
  { passive: true },
);
