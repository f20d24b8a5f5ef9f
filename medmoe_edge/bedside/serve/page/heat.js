// Paints where a phrase lies, in viridis (matplotlib, CC0): the hotter the lighter and denser.

import { bytes } from "./api.js";

const COLOURS = [
  [68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142],
  [31, 158, 137], [53, 183, 121], [109, 205, 89], [180, 222, 44], [253, 231, 37],
];
const COVER = 0.6; // of the hottest place; the coldest is left as it is

/** Paint `/v1/locate`'s map on a canvas over the picture, and a ring around its peak. Its least and most similarity. */
export async function paintHeat(canvas, location, picture) {
  const { width, height } = picture;
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const map = await createImageBitmap(new Blob([bytes(location.heat_png)], { type: "image/png" }));
  context.drawImage(map, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  const range = rangeOf(pixels.data);
  const palette = colours(range);
  const painted = new Uint32Array(pixels.data.buffer);
  for (let at = 0; at < painted.length; at += 1) painted[at] = palette[painted[at] & 255];
  context.putImageData(pixels, 0, 0);
  ring(context, location.peak.map((at) => ((at + 0.5) * width) / location.size[0]), width, height);
  return range.map((grey) => grey / 127.5 - 1); // as the service draws -1 to 1
}

/** Draw the scale of a map's colours, from its coldest to its hottest. */
export function drawScale(context, left, top, width, height) {
  const scale = context.createLinearGradient(left, 0, left + width, 0);
  COLOURS.forEach((colour, at) => scale.addColorStop(at / 9, `rgb(${colour})`));
  context.fillStyle = scale;
  context.fillRect(left, top, width, height);
}

/** The coldest and the hottest grey of the map. */
function rangeOf(data) {
  let [low, high] = [255, 0];
  for (let at = 0; at < data.length; at += 4) {
    low = Math.min(low, data[at]);
    high = Math.max(high, data[at]);
  }
  return [low, high];
}

/** The colour of every grey of the map. */
function colours([low, high]) {
  return Uint32Array.from({ length: 256 }, (_, grey) => {
    const share = Math.min(Math.max((grey - low) / (high - low || 1), 0), 1);
    const at = Math.min(Math.floor(share * 9), 8);
    const [red, green, blue] = COLOURS[at].map((from, channel) =>
      Math.round(from + (share * 9 - at) * (COLOURS[at + 1][channel] - from)),
    );
    return (Math.round(255 * COVER * share) << 24) | (blue << 16) | (green << 8) | red;
  });
}

function ring(context, [x, y], width, height) {
  const unit = Math.max(width, height) / 512;
  for (const [radius, line, colour] of [[12, 5, "black"], [12, 2.5, "white"]]) {
    context.beginPath();
    context.arc(x, y, radius * unit, 0, 2 * Math.PI);
    context.lineWidth = line * unit;
    context.strokeStyle = colour;
    context.stroke();
  }
}
