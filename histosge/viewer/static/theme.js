// Light or dark: as the system has it, unless the reader chooses. The choice stays with this browser, not in a link.

import { find } from "./elements.js";

const KEY = "histosge-theme";

/** Follow the system or the choice, and keep following. @param onChange called when colours have changed */
export function followTheme(onChange) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const choice = find("theme");
  choice.value = stored() ?? "auto";
  const apply = () => {
    const isDark = choice.value === "dark" || (choice.value === "auto" && dark.matches);
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
    onChange();
  };
  choice.addEventListener("change", () => {
    store(choice.value);
    apply();
  });
  dark.addEventListener("change", apply);
  apply();
}

// A page that was opened from a file, or a browser that keeps nothing, may refuse both.
function stored() {
  try {
    const found = localStorage.getItem(KEY);
    return ["auto", "light", "dark"].includes(found) ? found : null;
  } catch {
    return null;
  }
}

function store(value) {
  try {
    localStorage.setItem(KEY, value);
  } catch {
    // the choice then lasts until the page is closed
  }
}
