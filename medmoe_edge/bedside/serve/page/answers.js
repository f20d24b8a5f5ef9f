// One question and what came of it, as an entry of the list: what to beware of, the answer, the details.

import { known, number, words } from "./language.js";

const list = document.getElementById("answers");
const template = document.getElementById("answer-template");

/** 0 to 1 as people say it, and never more sure than it is. */
export function percent(share) {
  const said = (value) => number(value, { style: "percent" });
  if (share > 0.99 && share < 1) return words("over", { share: said(0.99) });
  if (share < 0.01 && share > 0) return words("under", { share: said(0.01) });
  return said(share);
}

/** A modality or an expert as people write it. */
export const named = (name) => (known(`modality.${name}`) ? words(`modality.${name}`) : name);

const seconds = (time) => `${number(time, { minimumFractionDigits: time < 0.1 ? 3 : 2, maximumFractionDigits: time < 0.1 ? 3 : 2 })} s`;

/** A warning of the service: in the reader's language where its words never differ, else in English. */
export function warned({ code, message }) {
  return `${words("warning")} ${known(`warning.${code}`) ? words(`warning.${code}`) : message}`;
}

/** Show the answers about this slice alone: those about another must not stand beside it. */
export function showAbout(key) {
  for (const entry of list.children) entry.hidden = entry.dataset.key !== key;
}

export class Entry {
  root = template.content.firstElementChild.cloneNode(true);
  question;
  about; // of the viewer: the slice, and its picture
  found = null; // what the service answered
  actions = []; // [key of its name, what it does]
  #redraw = () => {};

  constructor(question, about) {
    Object.assign(this, { question, about });
    this.#part(".question").textContent = question;
    this.root.dataset.key = about.key;
    list.append(this.root);
    this.#warn(about.picture.warnings); // they are true of any answer about it
    this.waits("waiting");
  }

  /** Say why there is nothing yet. */
  waits(key, values) {
    this.root.setAttribute("aria-busy", "true");
    this.#status(words(key, values));
  }

  /** Add a piece of the answer. */
  token(text) {
    const place = this.#part(".text");
    place.textContent = (place.textContent + text).trimStart();
    this.#status("");
    this.#reveal();
  }

  /** The whole answer. */
  answer(found) {
    this.found = found;
    this.#redraw = () => {
      const { timings, unsure, stopped } = found;
      this.#warn(found.warnings);
      this.#part(".doubt").textContent = unsure ? words(found.answer ? "guess" : "unsure") : "";
      this.#part(".text").textContent = found.answer || words("no.answer");
      this.#done(stopped ? words(`stopped.${stopped}`) : "");
      const calibrated = found.confidence_kind === "calibrated";
      this.#summary(words(calibrated ? "own.chance" : "own.probability", { share: percent(found.confidence) }), seconds(timings.total));
      this.#shares(words("experts"), found.experts, found.modality);
      const time = { first: seconds(timings.first_token), tokens: timings.tokens, total: seconds(timings.total) };
      this.#facts({
        [words("probability")]: words(calibrated ? "chance.what" : "probability.what"),
        [words("read.as")]: found.modality ? named(found.modality) : words("read.not"),
        [words("choices")]: Object.entries(found.probabilities ?? {})
          .map(([choice, share]) => `${choice} ${percent(share)}`)
          .join(", "),
        [words("frame")]: this.about.name,
        [words("time")]: [words("time.what", time), timings.prefix_reused && words("time.known")].filter(Boolean).join("; "),
        ...model(found.model),
      });
      this.#offer();
    };
    this.#redraw();
    return this.said();
  }

  /** Where a phrase lies. */
  location(found) {
    this.found = found;
    this.#redraw = () => {
      const { reading, similarity } = found;
      this.#warn(found.warnings);
      this.#part(".text").textContent = words("map");
      this.#part(".text").removeAttribute("lang");
      this.#done([reading.unfamiliar && words("unfamiliar"), words("map.no.finding")].filter(Boolean).join(" "));
      this.#summary(`${words("similarity")} ${number(similarity, TWO)}`, seconds(found.timings.total));
      this.#shares(words("read.as"), reading.probabilities, reading.modality);
      this.#facts({
        [words("similarity")]: words("similarity.what", { value: number(similarity, TWO) }),
        [words("frame")]: this.about.name,
        ...model(found.model),
      });
      this.#offer();
    };
    this.#redraw();
    return this.said();
  }

  /** What is to be read aloud or remembered of it, without its details. */
  said() {
    const warnings = [...this.#part(".warnings").children].map((each) => each.textContent);
    return [...warnings, this.line()].join(" ");
  }

  /** The answer in a line, without what to beware of. */
  line() {
    const text = (name) => this.#part(name).textContent;
    const said = [text(".doubt"), text(".text")].filter(Boolean).join(" ");
    const parts = [...this.#part("summary").children].map((each) => each.textContent);
    return [`${said}.`, text(".status"), parts.length && `(${parts[0]}.)`].filter(Boolean).join(" ");
  }

  /** What went wrong, and a way to try again. */
  problem(error, again) {
    this.#done(`${error.message} ${error.remedy ?? ""}`, "problem");
    this.actions = [["try.again", () => (this.root.remove(), again())]];
    this.#offer();
  }

  /** It was stopped by the reader. */
  stopped() {
    this.#done(words("stopped"));
  }

  /** Say it all in the language that is spoken now. */
  translate() {
    this.#redraw();
  }

  #part(name) {
    return this.root.querySelector(name);
  }

  /** What should be known of it comes first. */
  #warn(warnings) {
    const place = this.#part(".warnings");
    place.replaceChildren(...warnings.map((each) => made("li", warned(each))));
    place.hidden = !warnings.length;
    this.#reveal();
  }

  #done(status, kind = "quiet") {
    this.root.removeAttribute("aria-busy");
    this.#status(status, kind);
    this.#reveal();
  }

  #status(text, kind = "quiet") {
    const place = this.#part(".status");
    Object.assign(place, { textContent: text, hidden: !text, className: `status ${kind}` });
  }

  #summary(...parts) {
    this.#part("summary").replaceChildren(...parts.map((text) => made("span", text)));
    this.#part("details").hidden = false;
  }

  #shares(title, shares, main) {
    const rows = Object.entries(shares).map(([name, share]) => {
      const row = made("div", "");
      row.classList.toggle("main", name === main);
      row.append(made("dt", named(name)), made("dd", percent(share)));
      row.lastChild.style.setProperty("--share", share);
      return row;
    });
    this.#part("h3")?.remove();
    this.#part(".shares").replaceChildren(...rows);
    this.#part(".shares").before(made("h3", title));
  }

  #facts(facts) {
    const rows = Object.entries(facts).filter(([, value]) => value);
    this.#part("dl.facts").replaceChildren(...rows.flatMap(([name, value]) => [made("dt", name), made("dd", value)]));
  }

  #offer() {
    const buttons = this.actions.map(([key, act]) => {
      const button = made("button", words(key));
      button.type = "button";
      button.addEventListener("click", act);
      return button;
    });
    this.#part(".actions").replaceChildren(...buttons);
    this.#part(".actions").hidden = !buttons.length;
    this.#reveal();
  }

  #reveal() {
    list.scrollTop = this.root.offsetTop;
  }
}

const TWO = { minimumFractionDigits: 2, maximumFractionDigits: 2 };

/** Of a model, what says which it was. */
export const model = ({ name, sha256, verification, runtime }) => ({
  [words("model.fact")]: [name, runtime].filter(Boolean).join(", "),
  [words("verification")]: verification,
  "SHA-256": sha256,
});

function made(tag, text) {
  return Object.assign(document.createElement(tag), { textContent: text });
}
