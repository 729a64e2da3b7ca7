// The page of all slides. Its data is a script that calls `preview.begin` once and `preview.add` for each slide, since a
// page that is opened from a disk may load scripts and may not fetch files.
"use strict";

const PAGE = 60; // cards at once: a browser lays out as many in a frame, whatever the number of slides
const ATTENTION = ["failed", "partial", "planned", "done"];
const CONTROLS = ["search", "state", "flag", "encoder", "mpp", "sort"];
const slides = [];
let about = {};
let shown = [];
let page = 0;

const preview = {
  begin(facts) {
    about = facts;
  },
  add(slide) {
    slide.flags ??= {};
    slide.embeddings ??= [];
    slide.patches ??= 0;
    slide.reason ??= "";
    slides.push(slide);
  },
};

const $ = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en-US");
const numbered = (n, noun) => `${number(n)} ${noun}${n === 1 ? "" : /(ch|sh|s|x)$/.test(noun) ? "es" : "s"}`;
const percent = (share) => (share > 0 && share < 0.01 ? "< 1 %" : `${Math.round(share * 100)} %`);
const scale = (mpp) => String(Number(mpp.toPrecision(3)));
const flagged = (slide) => Math.max(0, ...Object.values(slide.flags));

// Text only, never HTML: ids and reasons come from files of other people.
function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children.filter((child) => child !== null && child !== ""));
  return made;
}

function options(id, choices) {
  $(id).replaceChildren(...choices.map(([value, label]) => new Option(label, value)));
}

function counted(values) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  return counts;
}

function fillControls() {
  const states = counted(slides.map((slide) => slide.state));
  options("state", [
    ["", `any (${number(slides.length)})`],
    ...ATTENTION.filter((state) => states.has(state)).map((s) => [s, `${s} (${number(states.get(s))})`]),
  ]);
  const flags = counted(slides.flatMap((slide) => Object.keys(slide.flags)));
  const far = slides.filter((slide) => slide.is_outlier).length;
  const unread = slides.filter(isUnreadable).length;
  options("flag", [
    ["", "any"],
    ...(far ? [["far", `far from the others (${number(far)})`]] : []),
    ...(unread ? [["unreadable", `unreadable patches (${number(unread)})`]] : []),
    ...[...flags.keys()].sort().map((flag) => [`flag:${flag}`, `${flag} (${number(flags.get(flag))})`]),
    ["none", "none"],
  ]);
  const encoders = counted(slides.flatMap((slide) => [...new Set(slide.embeddings.map((e) => e.encoder))]));
  options("encoder", [
    ["", "any"],
    ...[...encoders.keys()].sort().map((name) => [name, `${name} (${number(encoders.get(name))})`]),
  ]);
  const scales = counted(slides.filter((slide) => slide.mpp).map((slide) => scale(slide.mpp)));
  options("mpp", [
    ["", "any"],
    ...[...scales.keys()]
      .sort((a, b) => Number(a) - Number(b))
      .map((mpp) => [mpp, `${mpp} (${number(scales.get(mpp))})`]),
  ]);
}

function isUnreadable(slide) {
  return slide.embeddings.some((embedding) => embedding.unreadable);
}

function reasons(slide) {
  return [slide.reason, ...slide.embeddings.map((embedding) => embedding.reason ?? "")].filter(Boolean);
}

function hasFlag(slide, flag) {
  if (!flag) return true;
  if (flag === "far") return Boolean(slide.is_outlier);
  if (flag === "unreadable") return isUnreadable(slide);
  if (flag === "none") return !Object.keys(slide.flags).length && !slide.is_outlier && !isUnreadable(slide);
  return flag.slice("flag:".length) in slide.flags;
}

function attention(slide) {
  // Failed first, then what is incomplete, then what looks unlike the others, then what is flagged.
  const extra = slide.is_outlier ? 2 : isUnreadable(slide) ? 1.5 : flagged(slide);
  return ATTENTION.indexOf(slide.state) * 10 - extra;
}

const ORDERS = {
  attention: (a, b) => attention(a) - attention(b),
  name: () => 0,
  patches: (a, b) => b.patches - a.patches,
  fewest: (a, b) => a.patches - b.patches,
  tissue: (a, b) => (a.tissue_share ?? 0) - (b.tissue_share ?? 0),
  flags: (a, b) => flagged(b) - flagged(a),
  shift: (a, b) => (b.shift ?? -1) - (a.shift ?? -1),
  mpp: (a, b) => (a.mpp ?? Infinity) - (b.mpp ?? Infinity),
};

function choose() {
  const text = $("search").value.trim().toLowerCase();
  const [state, flag, encoder, mpp] = ["state", "flag", "encoder", "mpp"].map((id) => $(id).value);
  shown = slides
    .filter(
      (slide) =>
        (!state || slide.state === state) &&
        hasFlag(slide, flag) &&
        (!encoder || slide.embeddings.some((embedding) => embedding.encoder === encoder)) &&
        (!mpp || (slide.mpp && scale(slide.mpp) === mpp)) &&
        (!text || [slide.slide_id, ...reasons(slide)].some((part) => part.toLowerCase().includes(text))),
    )
    // A stable sort, after the order of the ids: equal slides stay in it.
    .sort(ORDERS[$("sort").value]);
  page = 0;
  show();
}

function show() {
  const pages = Math.max(1, Math.ceil(shown.length / PAGE));
  const part = shown.slice(page * PAGE, (page + 1) * PAGE);
  $("slides").replaceChildren(
    ...(part.length ? part.map(card) : [element("p", "empty", "No slide matches these choices.")]),
  );
  $("pages").textContent = `page ${page + 1} of ${number(pages)}, ${number(shown.length)} of ${numbered(slides.length, "slide")}`;
  $("previous").disabled = page === 0;
  $("next").disabled = page >= pages - 1;
}

function turn(step) {
  page += step;
  show();
  window.scrollTo({ top: 0 });
  $("slides").focus({ preventScroll: true });
}

function picture(slide) {
  if (!slide.picture) return element("div", "picture none", "no picture");
  const image = element("img");
  image.loading = "lazy";
  image.decoding = "async";
  image.alt = `${slide.slide_id} with the outline of its tissue`;
  image.src = slide.picture.split("/").map(encodeURIComponent).join("/");
  return element("div", "picture", image);
}

function badges(slide) {
  const made = [element("span", `badge ${slide.state}`, slide.state)];
  if (slide.is_outlier) made.push(element("span", "badge far", "far from the others"));
  for (const [flag, share] of Object.entries(slide.flags).sort((a, b) => b[1] - a[1]))
    made.push(element("span", "badge flag", `${flag} ${percent(share)}`));
  const unreadable = slide.embeddings.reduce((total, embedding) => total + (embedding.unreadable ?? 0), 0);
  if (unreadable) made.push(element("span", "badge", `${number(unreadable)} unreadable`));
  return element("span", "badges", ...made);
}

function facts(slide) {
  const parts = [];
  if (slide.grid) parts.push(slide.patches ? numbered(slide.patches, "patch") : "no tissue found");
  if (slide.mpp) parts.push(`${scale(slide.mpp)} µm/px`);
  const open = slide.embeddings.filter((embedding) => embedding.state === "partial");
  if (open.length) parts.push(`${number(open[0].done ?? 0)} of ${number(open[0].planned ?? 0)} blocks`);
  return element("span", "facts", parts.join(" · "));
}

function card(slide) {
  const why = reasons(slide)[0] ?? "";
  const made = element(
    "button",
    `card ${slide.state}`,
    picture(slide),
    element("span", "name", slide.slide_id),
    facts(slide),
    badges(slide),
    why ? element("span", "reason", why) : null,
  );
  made.type = "button";
  made.dataset.slide = slide.slide_id;
  made.addEventListener("click", () => showDetail(slide));
  return made;
}

function term(name, value) {
  return value ? [element("div", "", element("dt", "", name), element("dd", "", value))] : [];
}

function embeddingTable(slide) {
  if (!slide.embeddings.length) return "";
  const header = ["grid", "encoder", "state", "blocks", "unreadable", "why"];
  const rows = slide.embeddings.map((e) => [
    e.grid,
    e.encoder,
    e.state,
    e.state === "planned" ? number(e.planned ?? 0) : `${number(e.done ?? 0)} / ${number(e.planned ?? 0)}`,
    number(e.unreadable ?? 0),
    e.reason ?? "",
  ]);
  const line = (tag, cells) => element("tr", "", ...cells.map((cell) => element(tag, "", cell)));
  const head = element("thead", "", line("th", header));
  const body = element("tbody", "", ...rows.map((cells) => line("td", cells)));
  return element("div", "wide", element("table", "", head, body));
}

function showDetail(slide) {
  $("detail-title").textContent = slide.slide_id;
  const size = slide.size_px ? `${number(slide.size_px[0])} × ${number(slide.size_px[1])} px` : "";
  $("detail-body").replaceChildren(
    badges(slide),
    picture(slide),
    slide.reason ? element("p", "reason", slide.reason) : "",
    element(
      "dl",
      "",
      ...term("size", size),
      ...term("microns per pixel", slide.mpp ? scale(slide.mpp) : ""),
      ...term("tissue", slide.grid ? `${numbered(slide.patches, "patch")}, ${percent(slide.tissue_share ?? 0)}` : ""),
      ...term("grid", slide.grid ?? ""),
      ...term("distance from the others", slide.shift ? slide.shift.toFixed(2) : ""),
      ...term("picture", { slide: "from the slide", colours: "from the mean colours of patches" }[slide.picture_of] ?? ""),
    ),
    embeddingTable(slide),
  );
  $("detail").showModal();
}

function begin() {
  const total = slides.reduce((sum, slide) => sum + slide.patches, 0);
  document.title = `Slides: ${about.name ?? ""}`;
  $("store").textContent = (about.name ?? "") + (about.kind === "plan" ? " (planned, nothing is embedded yet)" : "");
  const states = counted(slides.map((slide) => slide.state));
  $("counts").textContent = [
    numbered(slides.length, "slide"),
    ...ATTENTION.filter((state) => states.has(state)).map((state) => `${number(states.get(state))} ${state}`),
    numbered(total, "patch"),
  ].join(" · ");
  fillControls();
  for (const id of CONTROLS) $(id).addEventListener("input", choose);
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));
  // A click beside the dialog closes it, as people expect.
  $("detail").addEventListener("click", (event) => event.target === $("detail") && $("detail").close());
  choose();
  document.body.dataset.state = "ready";
}

document.addEventListener("DOMContentLoaded", begin);
