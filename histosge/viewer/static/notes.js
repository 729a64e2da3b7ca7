// What the page says above the views: one sentence for each matter, put there and taken back by its name.

const notes = new Map();

/** Say something above the views, or take it back with an empty text. */
export function note(about, text) {
  if (text) notes.set(about, text);
  else notes.delete(about);
  show();
}

/** Take everything back, except what a link has named and is not there. */
export function clearNotes() {
  for (const about of [...notes.keys()]) if (!about.startsWith("link")) notes.delete(about);
  show();
}

function show() {
  document.getElementById("notes").textContent = [...notes.values()].join(" ");
}
