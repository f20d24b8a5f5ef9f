// One question and what came of it, as an entry of the list.

const list = document.getElementById("answers");
const template = document.getElementById("answer-template");

/** 0 to 1 as people say it, and never more sure than it is. */
export function percent(share) {
  if (share > 0.99 && share < 1) return "over 99%";
  if (share < 0.01 && share > 0) return "under 1%";
  return `${Math.round(share * 100)}%`;
}

const NAMES = { ct: "CT", mri: "MRI", xray: "X-ray" };

/** A modality or an expert as people write it. */
export const named = (name) => NAMES[name] ?? name;

const STOPPED = {
  length: "Cut off: this is the longest answer that was allowed.",
  repetition: "Cut off: the model began to repeat itself.",
};

const seconds = (time) => `${time < 0.1 ? time.toFixed(3) : time.toFixed(2)} s`;

/** Show the answers about this frame alone: those about another must not stand beside it. */
export function showAbout(frame) {
  for (const entry of list.children) entry.hidden = entry.dataset.frame !== frame;
}

export class Entry {
  #root = template.content.firstElementChild.cloneNode(true);
  #part = (name) => this.#root.querySelector(name);

  constructor(question, frame) {
    this.#part(".question").textContent = question;
    this.#root.dataset.frame = frame; // as people count, "" where there is one alone
    list.append(this.#root);
    this.waits("Waiting.");
    this.#reveal();
  }

  /** Say why there is nothing yet. */
  waits(why) {
    this.#root.setAttribute("aria-busy", "true");
    this.#status(why);
  }

  /** Add a piece of the answer. */
  token(text) {
    const place = this.#part(".text");
    place.textContent = (place.textContent + text).trimStart();
    this.#status("");
    this.#reveal();
  }

  /** The whole answer. */
  answer(found, frame) {
    const said = found.answer || "(no answer)";
    const shown = found.unsure ? `Unsure. ${found.answer ? "Best guess: " : ""}${said}` : said;
    this.#part(".text").textContent = shown;
    const warned = this.#warnings(found);
    this.#done(STOPPED[found.stopped] ?? "");
    const { timings } = found;
    this.#summary(`Own probability ${percent(found.confidence)}`, seconds(timings.total));
    this.#shares("Experts", found.experts, found.modality);
    this.#facts({
      Probability: "The model’s own, of these very words; not the chance that they are right.",
      Choices: Object.entries(found.probabilities ?? {})
        .map(([choice, share]) => `${choice} ${percent(share)}`)
        .join(", "),
      "Image read as": found.modality ? named(found.modality) : "not known to this model",
      Frame: frame,
      Time:
        `First word ${seconds(timings.first_token)}, all ${timings.tokens} tokens ` +
        `${seconds(timings.total)}${timings.prefix_reused ? "; image known already" : ""}`,
      ...model(found.model),
    });
    return `${warned}${shown}. Own probability ${percent(found.confidence)}.`;
  }

  /** Where a phrase lies; `show` brings its map back. */
  location(found, frame, show) {
    const { reading, similarity } = found;
    const said = `Similarity to the whole image ${similarity.toFixed(2)}, from -1 to 1.`;
    this.#part(".text").textContent = "Map on the image";
    const warned = this.#warnings(found);
    this.#done(reading.unfamiliar ? "Unfamiliar image: unlike those the model knows. Do not rely on this." : "");
    this.#summary(`Similarity ${similarity.toFixed(2)}`, seconds(found.timings.total));
    this.#shares("Image read as", reading.probabilities, reading.modality);
    this.#facts({ Similarity: said, Frame: frame, ...model(found.model) });
    this.#action("Show on the image", show);
    return `${warned}${said} The map is on the image.`;
  }

  /** What went wrong, and a way to try again. */
  problem(error, again) {
    this.#done(`${error.message} ${error.remedy ?? ""}`, "problem");
    this.#action("Try again", () => (this.#root.remove(), again()));
  }

  /** It was stopped by the reader. */
  stopped() {
    this.#done("Stopped.");
  }

  /** What should be known of it; gives the same to be read aloud. */
  #warnings({ warnings }) {
    const place = this.#part(".warnings");
    place.replaceChildren(...warnings.map(({ message }) => made("li", `Warning: ${message}`)));
    place.hidden = !warnings.length;
    return warnings.map(({ message }) => `Warning: ${message} `).join("");
  }

  #done(status, kind = "quiet") {
    this.#root.removeAttribute("aria-busy");
    this.#status(status, kind);
    this.#reveal();
  }

  #status(text, kind = "quiet") {
    const place = this.#part(".status");
    Object.assign(place, { textContent: text, hidden: !text, className: `status ${kind}` });
  }

  #summary(...parts) {
    for (const older of list.querySelectorAll("details[open]")) older.open = false;
    this.#part("summary").replaceChildren(...parts.map((text) => made("span", text)));
    Object.assign(this.#part("details"), { hidden: false, open: true });
    this.#reveal();
  }

  #shares(title, shares, main) {
    const rows = Object.entries(shares).map(([name, share]) => {
      const bar = made("i", "");
      bar.style.setProperty("--share", share);
      const row = made("div", "");
      row.classList.toggle("main", name === main);
      row.append(made("dt", named(name)), bar, made("dd", percent(share)));
      return row;
    });
    this.#part(".shares").replaceChildren(...rows);
    this.#part(".shares").before(made("h3", title));
    this.#reveal();
  }

  #facts(facts) {
    const rows = Object.entries(facts).filter(([, value]) => value);
    const place = this.#part("dl.facts");
    place.replaceChildren(...rows.flatMap(([name, value]) => [made("dt", name), made("dd", value)]));
    this.#reveal();
  }

  #action(name, act) {
    const button = made("button", name);
    button.type = "button";
    button.addEventListener("click", act);
    this.#part(".actions").replaceChildren(button);
    this.#part(".actions").hidden = false;
    this.#reveal();
  }

  #reveal() {
    list.scrollTop = this.#root.offsetTop;
  }
}

const model = ({ name, sha256, verification, runtime }) => ({
  Model: [name, runtime].filter(Boolean).join(", "),
  Verification: verification,
  "SHA-256": sha256,
});

function made(tag, text) {
  return Object.assign(document.createElement(tag), { textContent: text });
}
