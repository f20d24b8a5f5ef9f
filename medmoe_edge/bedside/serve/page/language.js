// The words of the page in the reader's language. The model itself reads and answers English.

import { LANGUAGES, TEXTS } from "./texts.js";

const CODES = Object.keys(LANGUAGES);
const ATTRIBUTES = ["aria-label", "placeholder", "title"];

let at = 0; // which of LANGUAGES

/** The code of the language, as BCP 47 has it. */
export const language = () => CODES[at];

/** A text of the catalogue; `{name}` in it becomes the value of that name. */
export function words(key, values = {}) {
  return TEXTS[key][at].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Whether the catalogue has a text. */
export const known = (key) => key in TEXTS;

/** A number as people write it here. */
export const number = (value, options) => value.toLocaleString(language(), options);

/** Put the page into a language, or into English where it is not one of ours. */
export function speak(code) {
  at = Math.max(CODES.indexOf(code), 0);
  document.documentElement.lang = language();
  translate(document);
  for (const template of document.querySelectorAll("template")) translate(template.content);
  dispatchEvent(new Event("language"));
}

function translate(root) {
  for (const element of root.querySelectorAll("[data-text]")) element.textContent = words(element.dataset.text);
  for (const name of ATTRIBUTES) {
    for (const element of root.querySelectorAll(`[data-${name}]`)) {
      element.setAttribute(name, words(element.getAttribute(`data-${name}`)));
    }
  }
}

/** The language of the address (`/#de`), else the first of the browser's that is one of ours. */
export function preferred() {
  const wanted = [location.hash.slice(1), ...navigator.languages].map((code) => code.split("-")[0]);
  return wanted.find((code) => CODES.includes(code)) ?? CODES[0];
}
