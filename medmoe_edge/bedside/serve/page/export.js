// Takes an answer out of the page: as text, or as a picture with the image. Never with the patient's name.

import { model, warned } from "./answers.js";
import { drawScale } from "./heat.js";
import { number, words } from "./language.js";

const WIDTH = 800; // of the picture that is saved
const TALLEST = 640; // of the image in it
const MARGIN = 24;
const SCALE = 52; // of the scale of colours below a map
const FONT = "system-ui, sans-serif";

/** An answer as lines: [text, whether it stands out]. */
export function linesOf({ question, found, about }, text) {
  const { picture, name, windowed } = about;
  const facts = Object.entries(model(found.model)).filter(([, value]) => value);
  return [
    ...found.warnings.map((each) => [warned(each), true]),
    [found.phrase ? words("map.phrase", { phrase: question }) : question, false],
    [text, true],
    [[picture.modality?.toUpperCase(), name && `${words("frame")} ${name}`].filter(Boolean).join(" · "), false],
    [windowed ? words("export.window") : "", false],
    ...facts.map(([key, value]) => [`${key}: ${value}`, false]),
    [new Date().toISOString().replace(/\.\d+/, ""), false],
    [words("notice"), true],
  ].filter(([line]) => line);
}

/** Copy text. Whether the browser lets us. */
export async function copy(lines) {
  try {
    await navigator.clipboard.writeText(`${lines.map(([text]) => text).join("\n")}\n`);
    return true;
  } catch {
    return false; // it is no secure context, or the reader does not allow it
  }
}

/** Save a PNG file of some layers of an image, its sides, a map's scale if there is one, and lines below it. */
export async function save({ layers, scale: range }, sides, lines) {
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d");
  const [image] = layers;
  const scale = Math.min(WIDTH / image.width, TALLEST / image.height);
  const [width, height] = [image.width * scale, image.height * scale];
  const wrapped = lines.flatMap(([text, strong]) => wrap(context, text, strong).map((part) => [part, strong]));
  canvas.width = WIDTH;
  const below = height + (range ? SCALE : 0);
  canvas.height = Math.ceil(below) + wrapped.length * 24 + 2 * MARGIN;
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = "black";
  context.fillRect(0, 0, WIDTH, height);
  for (const layer of layers) context.drawImage(layer, (WIDTH - width) / 2, 0, width, height);
  if (sides) mark(context, sides, height);
  if (range) explain(context, range, height);
  context.fillStyle = "#14212a";
  wrapped.forEach(([text, strong], at) => {
    context.font = fontOf(strong);
    context.fillText(text, MARGIN, below + MARGIN + 16 + at * 24);
  });
  const url = URL.createObjectURL(await new Promise((done) => canvas.toBlob(done, "image/png")));
  Object.assign(document.createElement("a"), { href: url, download: "medmoe-edge-answer.png" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

const fontOf = (strong) => `${strong ? 600 : 400} 16px ${FONT}`;

/** Draw the scale of a map's colours, with its ends. */
function explain(context, [low, high], top) {
  drawScale(context, MARGIN, top + 12, WIDTH - 2 * MARGIN, 12);
  Object.assign(context, { font: fontOf(false), fillStyle: "#14212a" });
  context.fillText(`${fixed(low)} ${words("heat.least")}`, MARGIN, top + 44);
  context.textAlign = "end";
  context.fillText(`${words("heat.most")} ${fixed(high)}`, WIDTH - MARGIN, top + 44);
  context.textAlign = "start";
}

const fixed = (value) => number(value, { minimumFractionDigits: 2, maximumFractionDigits: 2 });

function mark(context, [left, top, right, bottom], height) {
  const middle = height / 2;
  const places = [[left, 20, middle], [top, WIDTH / 2, 20], [right, WIDTH - 20, middle], [bottom, WIDTH / 2, height - 16]];
  Object.assign(context, { font: fontOf(true), fillStyle: "#ffe08a", strokeStyle: "black", lineWidth: 3, textAlign: "center" });
  for (const [letter, x, y] of places) {
    context.strokeText(letter, x, y);
    context.fillText(letter, x, y);
  }
  context.textAlign = "start";
}

/** A text in lines that fit, broken between words, or within one that is too long. */
function wrap(context, text, strong) {
  context.font = fontOf(strong);
  const fits = (part) => context.measureText(part).width <= WIDTH - 2 * MARGIN;
  const lines = [""];
  for (const piece of text.match(/\s+|[^\s]/gu)) {
    if (fits(lines.at(-1) + piece)) {
      lines[lines.length - 1] += piece;
      continue;
    }
    const at = lines.at(-1).lastIndexOf(" ");
    const rest = at > 0 ? lines.at(-1).slice(at + 1) : "";
    if (at > 0) lines[lines.length - 1] = lines.at(-1).slice(0, at);
    lines.push((rest + piece).trimStart());
  }
  return lines;
}
