// What the page says above the views: one sentence for each matter, put there and taken back by its name.

import { element } from "./elements.js";

const notes = new Map();

/**
 * Say something above the views, or take it back with an empty text.
 * @param isQuiet whether it is good to know, and no warning
 */
export function note(about, text, isQuiet = false) {
  if (text) notes.set(about, { text, isQuiet });
  else notes.delete(about);
  show();
}

/** Take everything back, except what a link has named and is not there. */
export function clearNotes() {
  for (const about of [...notes.keys()]) if (!about.startsWith("link")) notes.delete(about);
  show();
}

function show() {
  // Warnings first: what is good to know is said at every slide.
  const said = [...notes.values()].sort((one, other) => one.isQuiet - other.isQuiet);
  const parts = said.flatMap(({ text, isQuiet }) => [" ", element("span", isQuiet ? "quiet" : "", text)]);
  document.getElementById("notes").replaceChildren(...parts.slice(1));
}
