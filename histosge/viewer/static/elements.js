// Making and finding parts of the page. Text from stores is only ever set as text, never as markup.

/** Return the part of the page with an id. */
export function find(id) {
  return document.getElementById(id);
}

/** Whether the tools lie under the views, see viewer.css: then what is touched may be out of sight. */
export function isNarrow() {
  return window.innerWidth <= 800;
}

/** Make an element with a class and children: elements, or text. */
export function element(name, kind, ...children) {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  made.append(...children);
  return made;
}

/** A number with its noun: "1 spot", "2 spots". The noun takes the plural in -s or -es. */
export function counted(n, noun) {
  return `${n} ${noun}${n === 1 ? "" : /(ch|sh|s|x)$/.test(noun) ? "es" : "s"}`;
}

/** Make a button. */
export function button(text, onClick, label = text) {
  const made = element("button", "", text);
  made.type = "button";
  made.setAttribute("aria-label", label);
  made.addEventListener("click", onClick);
  return made;
}

/** Hand a file to the browser for saving. */
export function saveFile(name, content, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000); // the browser may still be reading it
}

/** A name of letters that every file system takes. */
export function fileName(...parts) {
  return parts.filter(Boolean).join("_").replace(/[^A-Za-z0-9._-]+/g, "-").slice(0, 120);
}
