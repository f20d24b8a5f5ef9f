// Whose picture it is, and where left and right are. Shown, and kept nowhere.

import { words } from "./language.js";

const $ = (id) => document.getElementById(id);
const EDGES = ["left", "top", "right", "bottom"];

/** Show what a picture's file says of its patient and its sides; null takes it away. */
export function showBanner(picture) {
  $("patient").hidden = !picture;
  $("patient").replaceChildren(...(picture ? parts(picture.patient) : []));
  for (const [at, edge] of EDGES.entries()) {
    $(`side-${edge}`).textContent = picture?.sides?.[at] ?? "";
  }
  $("sides-unknown").hidden = !picture || picture.sides !== null;
}

/** Who it is, in one line, for the history. */
export function patientLine({ patient }) {
  return [patient.name, patient.id].filter(Boolean).join(" · ") || words("patient.unknown");
}

/** The sides as words for those who cannot see them; empty where they are not known. */
export function sidesLine({ sides }) {
  return sides ? words("sides", Object.fromEntries(EDGES.map((edge, at) => [edge, sides[at]]))) : "";
}

function parts(patient) {
  const { name, id, birth_date: born, sex, study_date: date, study, series, laterality } = patient;
  const who = [name, id].filter(Boolean);
  const rest = [
    born && words("patient.born", { date: born }),
    sex && words(["M", "F", "O"].includes(sex) ? `patient.sex.${sex}` : "patient.sex.O"),
    date && words("patient.study", { date }),
    study,
    series,
    laterality && words("patient.laterality", { laterality }),
  ].filter(Boolean);
  const strong = made("strong", who.length ? who.join(" · ") : words("patient.unknown"));
  return rest.length ? [strong, made("span", rest.join(" · "))] : [strong];
}

const made = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
