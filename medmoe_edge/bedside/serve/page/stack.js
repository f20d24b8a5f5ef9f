// The slices of what was opened: the frames of one file, or the files of one series. Each file is sent
// once to be shown; what was shown is kept in the memory of the tab, as far as there is room.

import { bytes, events, post, Problem } from "./api.js";
import { words } from "./language.js";

const KEPT = 768 * 2 ** 20; // bytes of pictures
const AT_ONCE = 2; // files of a series that are sent
const byName = new Intl.Collator("en", { numeric: true });

export class Stack {
  slices = []; // { key, file, frame, frames, place, picture }
  files; // by name
  leftOut = 0; // files of other series, or with frames of their own
  unread = 0; // files that are no images
  #ended = new AbortController();
  #busy;
  #changed;
  #streaming = false;
  #arrived = promised();
  #bytes = 0;
  #near = null; // what is looked at: what is far from it is forgotten first

  /** `busy(seconds)` is told when the service wants us to wait, `changed()` when there is more. */
  constructor(files, busy, changed) {
    this.files = [...files].sort((one, other) => byName.compare(one.name, other.name));
    this.#busy = busy;
    this.#changed = changed;
  }

  /** Read the first slice: the one of this key, or the middle one. The others follow by themselves. */
  async open(key) {
    const [file, frame] = key ? key.split(".").map(Number) : [Math.floor((this.files.length - 1) / 2)];
    return this.files.length > 1 ? await this.#openSeries(file) : await this.#openFrames(0, frame);
  }

  /** The picture of a slice; reads it again where it was forgotten. */
  async picture(slice, signal) {
    this.#near = slice;
    while (!slice.picture && this.#streaming && !signal.aborted) await this.#arrived.promise;
    if (!slice.picture) this.#keep(slice, await this.#read(slice, signal));
    return slice.picture;
  }

  /** How many slices are still to come. */
  get missing() {
    return this.files.length > 1 ? this.files.length - this.slices.length - this.leftOut - this.unread : 0;
  }

  /** Read nothing more. */
  close() {
    this.#ended.abort();
    this.#arrived.resolve();
  }

  async #openFrames(index, frame) {
    const file = this.files[index];
    const fields = { image: file, patient: true, stream: true, ...(frame !== undefined && { frame }) };
    const { signal } = this.#ended;
    const coming = picturesOf(await post("/v1/picture", fields, { signal, busy: this.#busy }));
    const { value: first } = await coming.next();
    if (!first) throw new Problem(words("broke.off"), words("try.again"));
    const { frames } = first;
    this.slices = Array.from({ length: frames }, (_, at) => ({ key: `${index}.${at}`, file, frame: at, frames }));
    const slice = (this.#near = this.slices[first.frame]);
    this.#keep(slice, first);
    this.#follow(coming);
    return slice;
  }

  async #follow(coming) {
    this.#streaming = true;
    try {
      for await (const picture of coming) {
        this.#keep(this.slices[picture.frame], picture);
        if (this.#bytes > KEPT * 0.9) break;
      }
    } catch {
      // what is missing is read when it is looked at, and what is wrong with it told then
    }
    this.#streaming = false;
    this.#arrived.resolve();
  }

  async #openSeries(middle) {
    const order = this.files.map((_, index) => index);
    order.sort((one, other) => Math.abs(one - middle) - Math.abs(other - middle));
    const [index, first] = await this.#firstOf(order);
    if (first.frames > 1) {
      this.leftOut = this.files.length - this.unread - 1;
      order.length = 0;
      return await this.#openFrames(index);
    }
    const slice = (this.#near = this.#add(index, first));
    const one = async () => {
      while (order.length && !this.#ended.signal.aborted) await this.#addNext(order.shift(), first);
    };
    for (let count = 0; count < AT_ONCE; count += 1) one();
    return slice;
  }

  /** The first file that is an image, and its picture; raises what is wrong with them if none is. */
  async #firstOf(order) {
    let problem = null;
    while (order.length) {
      const index = order.shift();
      try {
        return [index, await this.#read({ file: this.files[index] }, this.#ended.signal)];
      } catch (error) {
        if (error.code !== "bad_image") throw error;
        this.unread += 1;
        problem = error;
      }
    }
    throw problem;
  }

  async #addNext(index, first) {
    try {
      const picture = await this.#read({ file: this.files[index] }, this.#ended.signal);
      if (picture.series === first.series && picture.frames === 1) this.#add(index, picture);
      else this.leftOut += 1; // of another patient or series: never among these
    } catch {
      this.unread += 1;
    }
    this.#changed();
  }

  #add(index, picture) {
    const { position, instance } = picture;
    const slice = { key: `${index}.0`, file: this.files[index], frames: 1, place: [position, instance, index], instance };
    this.slices.push(slice);
    this.slices.sort((one, other) => compare(one.place, other.place));
    this.#keep(slice, picture);
    return slice;
  }

  async #read({ file, frame, frames }, signal) {
    const fields = { image: file, patient: true, ...(frames > 1 && { frame }) };
    return unpacked(await (await post("/v1/picture", fields, { signal, busy: this.#busy })).json());
  }

  #keep(slice, picture) {
    if (slice.picture) return;
    slice.picture = picture;
    this.#bytes += weight(picture);
    this.#forget();
    this.#arrived.resolve();
    this.#arrived = promised();
    this.#changed();
  }

  #forget() {
    const here = this.slices.indexOf(this.#near);
    const kept = this.slices.flatMap((slice, at) => (slice.picture ? [[Math.abs(at - here), slice]] : []));
    kept.sort(([one], [other]) => other - one);
    for (const [distance, slice] of kept) {
      if (this.#bytes <= KEPT || distance === 0) return;
      this.#bytes -= weight(slice.picture);
      slice.picture = null;
    }
  }
}

async function* picturesOf(response) {
  for await (const [name, data] of events(response)) {
    if (name === "picture") yield unpacked(data);
    else if (name === "error") throw new Problem(data.error.message, data.error.remedy, data.error.code);
  }
}

/** A picture as /v1/picture tells it, its base64 as bytes. */
function unpacked(picture) {
  const codes = picture.codes && { ...picture.codes, data: new Uint16Array(bytes(picture.codes.data).buffer) };
  return { ...picture, png: new Blob([bytes(picture.png)], { type: "image/png" }), codes };
}

const weight = ({ png, codes }) => png.size + (codes?.data.byteLength ?? 0);

/** By the first in which both are known and differ. */
function compare(one, other) {
  const at = one.findIndex((value, index) => value !== null && other[index] !== null && value !== other[index]);
  return at < 0 ? 0 : one[at] - other[at];
}

function promised() {
  let resolve;
  const promise = new Promise((done) => (resolve = done));
  return { promise, resolve };
}
