// What was asked in this session, image by image: in the memory of this tab, and nowhere else.

import { patientLine } from "./banner.js";
import { words } from "./language.js";

const $ = (id) => document.getElementById(id);
const THUMB = 96; // pixels of the longer side

let images = []; // { files, entries: [{ entry, thumb }] }
let show = () => {};

/** Have `show(image, key)` called where a reader wants to go back to an image's slice. */
export function onShow(go) {
  show = go;
}

/** The record of what is asked about these files. */
export function recordOf(files) {
  return { files, entries: [] };
}

/** Remember an answer, with a small picture of its slice. */
export function remember(image, entry, thumb) {
  if (!images.includes(image)) images.push(image);
  if (!image.entries.some((one) => one.entry === entry)) image.entries.push({ entry, thumb });
  label();
}

/** All entries, to say them in another language. */
export const entries = () => images.flatMap((image) => image.entries.map(({ entry }) => entry));

function label() {
  $("history-open").textContent = [words("history"), entries().length || ""].filter(Boolean).join(" ");
}

/** A small picture of what a canvas shows now. */
export function thumbOf(canvas) {
  const scale = THUMB / Math.max(canvas.width, canvas.height);
  const small = made("canvas", "");
  [small.width, small.height] = [canvas.width, canvas.height].map((side) => Math.max(1, Math.round(side * scale)));
  small.getContext("2d").drawImage(canvas, 0, 0, small.width, small.height);
  return small.toDataURL();
}

function list() {
  const groups = images.flatMap((image) => [
    made("h3", patientLine(image.entries[0].entry.about.picture)),
    listOf(image),
  ]);
  $("history-list").replaceChildren(...(groups.length ? groups : [made("p", words("history.empty"))]));
  $("history-forget").disabled = !groups.length;
}

function listOf(image) {
  const rows = image.entries.map(({ entry, thumb }) => {
    const { name, key } = entry.about;
    const [row, text, go] = [made("li", ""), made("div", ""), made("button", words("history.show"))];
    const frame = name && ` (${words("frame")} ${name})`;
    text.append(made("strong", `${entry.question}${frame}`), made("p", entry.said()));
    go.type = "button";
    go.setAttribute("aria-label", `${words("history.show")}: ${entry.question}${frame}`);
    go.addEventListener("click", () => ($("history").close(), show(image, key)));
    row.append(Object.assign(made("img", ""), { src: thumb, alt: "" }), text, go);
    return row;
  });
  const all = made("ul", "");
  all.append(...rows);
  return all;
}

$("history-open").addEventListener("click", () => {
  list();
  $("history").showModal();
});
$("history-close").addEventListener("click", () => $("history").close());
$("history-forget").addEventListener("click", () => {
  for (const entry of entries()) entry.root.remove();
  images = [];
  label();
  list();
  dispatchEvent(new Event("forgotten"));
});
addEventListener("language", label);

function made(tag, text) {
  return Object.assign(document.createElement(tag), { textContent: text });
}
