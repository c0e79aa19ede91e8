"use strict";
// The gallery's page. What is asked is in the address, #text=…&image=N: a text to find images for, and the number of
// the chosen image; so the browser's back button and bookmarks work. Texts become nodes of text, never markup.

const MOST_IMAGE = 20e6; // bytes, as in server.py
const TASKS = {
  add_att: "attribute added", add_obj: "object added", replace_att: "attribute replaced",
  replace_obj: "object replaced", replace_rel: "relation replaced", swap_att: "attributes swapped",
  swap_obj: "objects swapped",
};
const byId = (id) => document.getElementById(id);

let gallery = null; // of /api/gallery
let asked = { text: "", image: null };
let sample = null; // of /api/sample, of the chosen image
let found = null; // of /api/text or /api/image
let turn = 0; // answers to earlier questions are dropped

// ---- elements

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

const shown = (score) => score.toFixed(3);
const named = (number) => (number === 1 ? "1 image" : `${number} images`);

function bar(score) {
  const filled = make("span", { className: "filled" });
  filled.style.width = `${100 * Math.min(1, Math.max(0, score))}%`;
  return make("span", { className: "bar", "aria-hidden": "true" }, filled);
}

function picture(number, caption) {
  const alt = caption || `image ${number}`;
  return make("img", { src: `/image/${number}`, alt, loading: "lazy", decoding: "async" });
}

// ---- requests

async function answer(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The gallery does not answer; has it been ended in its terminal?");
  }
  const content = await response.json().catch(() => ({ error: `the gallery answered with status ${response.status}` }));
  if (!response.ok) throw new Error(content.error);
  return content;
}

function findByText(text, image) {
  const body = JSON.stringify(image === null ? { text } : { text, image });
  return answer("/api/text", { method: "POST", headers: { "Content-Type": "application/json" }, body });
}

function findByImage(image) {
  const type = image.type.startsWith("image/") ? image.type : "application/octet-stream";
  return answer("/api/image", { method: "POST", headers: { "Content-Type": type }, body: image });
}

function say(text, failed = false) {
  byId("asked").hidden = !text;
  byId("status").textContent = text;
  byId("status").classList.toggle("failed", failed);
}

// Runs `work`; what it returns is applied by `then`, unless something else has been asked meanwhile.
async function ask(work, then) {
  const mine = ++turn;
  document.body.setAttribute("aria-busy", "true");
  try {
    const content = await work();
    if (mine === turn) then(content);
  } catch (error) {
    if (mine === turn) say(error.message, true);
  } finally {
    if (mine === turn) document.body.removeAttribute("aria-busy");
  }
}

// ---- what is asked

function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  const image = /^\d{1,15}$/.test(words.get("image") ?? "") ? Number(words.get("image")) : null;
  return { text: words.get("text") ?? "", image: gallery && image < gallery.images ? image : null };
}

function go(change) {
  const next = { ...asked, ...change };
  const words = new URLSearchParams();
  if (next.text) words.set("text", next.text);
  if (next.image !== null) words.set("image", next.image);
  history.pushState(null, "", `${words}` ? `#${words}` : location.pathname);
  return show(next);
}

function show(next) {
  asked = next;
  const { text, image } = next;
  return ask(
    async () => [
      image === null || sample?.number === image ? sample : await answer(`/api/sample/${image}`),
      !text || (found?.text === text && found.image === image)
        ? found
        : { ...(await timed(() => findByText(text, image))), text, image },
    ],
    ([newSample, newFound]) => {
      const opened = image !== null && newSample !== sample;
      sample = image === null ? null : newSample;
      found = text || newFound?.preview ? newFound : null;
      if (!found?.preview) {
        showPreview(null);
        byId("text").value = text;
        say(found ? `${named(gallery.images)} ranked for “${text}” in ${found.milliseconds} ms` : "");
      }
      showSample();
      showResults();
      if (opened) byId("sample").focus({ preventScroll: true });
      if (opened) byId("sample").scrollIntoView({ block: "nearest", behavior: "smooth" });
    },
  );
}

async function timed(work) {
  const began = performance.now();
  const content = await work();
  return { ...content, milliseconds: Math.round(performance.now() - began) };
}

function searchImage(image) {
  if (image.size > MOST_IMAGE) {
    return say(`That file has ${(image.size / 1e6).toFixed(1)} MB; images of ${MOST_IMAGE / 1e6} MB are taken at most.`, true);
  }
  return ask(
    () => timed(() => findByImage(image)),
    (content) => {
      found = { ...content, preview: true };
      sample = null;
      asked = { text: "", image: null };
      history.pushState(null, "", location.pathname);
      byId("text").value = "";
      showPreview(image);
      say(`${named(gallery.images)} and ${gallery.captions} captions ranked for this image in ${found.milliseconds} ms`);
      showSample();
      showResults();
    },
  );
}

function showPreview(image) {
  const preview = byId("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.hidden = !image;
  if (image) preview.src = URL.createObjectURL(image);
  else preview.removeAttribute("src");
}

// ---- results

function showResults() {
  byId("examples").hidden = Boolean(found);
  byId("results").replaceChildren(...(found ? found.models.map(column) : [some()]));
}

// A few images, before anything has been asked.
function some() {
  const tiles = gallery.some.map(({ number, caption }) => {
    const label = caption || `image ${number}`;
    return make("li", {}, tile(number, caption, label, picture(number, "")));
  });
  return make("article", { className: "model" }, make("header", {}, make("p", {}, "Some of the images")),
    make("ol", { className: "tiles", "aria-label": "Some of the images" }, ...tiles));
}

function column(result, index) {
  const model = gallery.models[index];
  const head = make("header", {}, make("h2", {}, model.name), make("p", {}, model.about));
  if (result.image) {
    const { rank, score } = result.image;
    head.append(make("p", { className: "rank" }, make("span", {}, "chosen image "),
      make("b", {}, `rank ${rank}`), ` of ${gallery.images} · ${shown(score)}`));
  }
  const tiles = result.images.map((image, place) => make("li", {}, ranked(image, place + 1, model)));
  const parts = [head, make("ol", { className: "tiles", "aria-label": `Images that ${model.name} finds` }, ...tiles)];
  if (result.captions?.length) {
    parts.splice(1, 0, make("h3", {}, "Captions"), make("ol", { className: "captions" }, ...result.captions.map(
      (caption) => make("li", {}, make("button", { type: "button", onclick: () => go({ text: caption.text, image: null }) },
        make("span", {}, caption.text), make("span", { className: "score" }, shown(caption.score)), bar(caption.score))))),
      make("h3", {}, "Images"));
  }
  return make("article", { className: `model m${index % 6}`, "aria-label": model.name }, ...parts);
}

function ranked(image, rank, model) {
  const label = `${image.caption || `image ${image.number}`}: rank ${rank} of ${model.name}, score ${shown(image.score)}`;
  return tile(image.number, image.caption, label, picture(image.number, ""),
    make("span", { className: "under" }, make("span", { className: "place" }, String(rank)),
      make("span", { className: "score" }, shown(image.score))),
    bar(image.score));
}

function tile(number, title, label, ...children) {
  const onclick = () => go({ image: number });
  const button = make("button", { type: "button", className: "tile", "aria-label": label, title, onclick }, ...children);
  button.dataset.number = number;
  if (number === asked.image) button.setAttribute("aria-current", "true");
  return button;
}

// The same image in the other columns.
function markSame(number) {
  for (const each of document.querySelectorAll(".tile")) each.classList.toggle("same", each.dataset.number === number);
}

// ---- the chosen image

async function close() {
  const number = asked.image;
  await go({ image: null });
  document.querySelector(`.tile[data-number="${number}"]`)?.focus();
}

function showSample() {
  const section = byId("sample");
  section.hidden = !sample;
  if (!sample) return section.replaceChildren();
  const focused = section.contains(document.activeElement) ? document.activeElement.dataset.row : undefined;
  const similar = async () => searchImage(await (await fetch(`/image/${sample.number}`)).blob());
  const rows = [];
  if (sample.caption) {
    rows.push(row("caption", sample.caption, [], "caption", asked.text === sample.caption,
      () => go({ text: sample.caption }), sample.scores.map((score) => ({ caption: score }))));
  }
  sample.foils.forEach((foil, index) => {
    const swapped = asked.text === foil.foil;
    const [text, other] = swapped ? [foil.foil, foil.caption] : [foil.caption, foil.foil];
    const swap = () => go({ text: swapped ? foil.caption : foil.foil });
    const made = row(index, text, differing(text, other), swapped ? "foil" : "caption", swapped, swap, foil.scores);
    made.querySelector(".tag").before(make("span", { className: "task" }, TASKS[foil.task] ?? foil.task));
    rows.push(made);
  });
  section.replaceChildren(
    make("button", { type: "button", className: "close", "aria-label": "Close the chosen image", onclick: close }, "×"),
    make("div", { className: "side" }, picture(sample.number, sample.caption),
      make("p", {}, `${sample.set}, image ${sample.number}`),
      make("button", { type: "button", onclick: similar }, "Find similar images")),
    make("div", { className: "texts" },
      make("div", { className: "row names" }, make("span", {}, "cosine with the image"), ...gallery.models.map(verdict)),
      ...rows,
      ...(sample.foils.length ? [make("p", { className: "hint" },
        "A foil is the caption with one thing changed. Click a text to swap the two; the images are ranked for it.")] : [])));
  if (focused !== undefined) section.querySelector(`[data-row="${focused}"]`)?.focus();
}

// A model's name, and how often it prefers the caption of the chosen image.
function verdict({ name }, index) {
  const right = sample.foils.filter((foil) => foil.scores[index].prefers === "caption").length;
  const count = sample.foils.length ? make("small", {}, ` ${right} of ${sample.foils.length} ✓`) : "";
  return make("span", { className: `m${index % 6}` }, name, count);
}

function row(name, text, marked, side, pressed, onclick, scores) {
  const words = text.split(" ").flatMap((word, i) => [marked[i] ? make("mark", {}, word) : word, " "]);
  const button = make("button", { type: "button", onclick },
    make("span", { className: `tag ${side}` }, side), make("span", { className: "words" }, ...words));
  button.dataset.row = name;
  button.setAttribute("aria-pressed", pressed);
  return make("div", { className: `row${pressed ? " current" : ""}` }, button, ...scores.map(cell));
}

function cell(scores, index) {
  const { name } = gallery.models[index];
  const sides = ["caption", "foil"].filter((side) => side in scores);
  const lines = sides.map((side) => make("span", { className: `line ${side}${scores.prefers === side ? " preferred" : ""}` },
    make("span", { className: "side-name" }, side), bar(scores[side]), make("span", { className: "score" }, shown(scores[side]))));
  const said = sides.map((side) => `${side} ${shown(scores[side])}`).join(", ");
  const verdict = scores.prefers ? `${name} prefers the ${scores.prefers}: ${said}` : `${name}: ${said}`;
  const made = make("div", { className: `cell m${index % 6}`, role: "img", "aria-label": verdict, title: verdict }, ...lines);
  if (scores.prefers) made.classList.add(scores.prefers === "caption" ? "right" : "wrong");
  made.dataset.model = name;
  return made;
}

// For each word of a text whether it is not in the longest common subsequence with another text.
function differing(text, other) {
  const [a, b] = [text.split(" "), other.split(" ")];
  const length = Array.from({ length: a.length + 1 }, () => new Array(b.length + 1).fill(0));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      length[i][j] = a[i] === b[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
    }
  }
  const marked = a.map(() => true);
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) [marked[i], i, j] = [false, i + 1, j + 1];
    else if (length[i + 1][j] >= length[i][j + 1]) i += 1;
    else j += 1;
  }
  return marked;
}

// ---- keys, files

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/" && !event.target.matches("input")) {
    event.preventDefault();
    byId("text").select();
  } else if (event.key === "Escape" && asked.image !== null) {
    event.preventDefault();
    close();
  } else if (event.target.matches(".tile") && event.key.startsWith("Arrow")) {
    event.preventDefault();
    move(event.target, event.key);
  }
}

// Left and right go through a model's images; up and down to the nearest one above or below.
function move(from, key) {
  const tiles = [...document.querySelectorAll(".tile")];
  const own = [...from.closest(".tiles").querySelectorAll(".tile")];
  const place = own.indexOf(from);
  if (key === "ArrowLeft" || key === "ArrowRight") return own[place + (key === "ArrowRight" ? 1 : -1)]?.focus();
  const here = from.getBoundingClientRect();
  const distance = (each) => {
    const box = each.getBoundingClientRect();
    const down = key === "ArrowDown" ? box.top - here.top : here.top - box.top;
    return down < 1 ? Infinity : down + 0.5 * Math.abs(box.left - here.left);
  };
  const nearest = tiles.reduce((best, each) => (distance(each) < distance(best) ? each : best), from);
  nearest.focus();
}

function takeFile(files) {
  const file = [...files].find((each) => each.type.startsWith("image/")) ?? files[0];
  if (file) searchImage(file);
}

function onDrop(event) {
  event.preventDefault();
  byId("drop").hidden = true;
  takeFile(event.dataTransfer.files);
}

function start() {
  byId("query").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = byId("text").value.trim();
    if (text) go({ text });
  });
  byId("file").addEventListener("change", (event) => {
    takeFile(event.target.files);
    event.target.value = ""; // or the same file again would be no change
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) takeFile(event.clipboardData.files);
  });
  const overlay = (hidden) => (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    byId("drop").hidden = hidden;
  };
  document.addEventListener("dragenter", overlay(false));
  document.addEventListener("dragover", overlay(false));
  document.addEventListener("dragleave", (event) => event.relatedTarget || overlay(true)(event));
  document.addEventListener("drop", onDrop);
  document.addEventListener("keydown", onKey);
  const hovered = (event) => markSame(event.target.closest?.(".tile")?.dataset.number);
  byId("results").addEventListener("pointerover", hovered);
  byId("results").addEventListener("focusin", hovered);
  byId("results").addEventListener("pointerleave", () => markSame());
  window.addEventListener("popstate", () => show(readAddress()));
  ask(() => answer("/api/gallery"), (content) => {
    gallery = content;
    byId("about").textContent = described(content);
    byId("examples").replaceChildren(...content.examples.map((text) =>
      make("button", { type: "button", onclick: () => go({ text }) }, text)));
    show(readAddress());
  });
}

function described({ sets, models }) {
  const lists = sets.map(({ name, images, left_out }) =>
    `${named(images)} of ${name}${left_out ? ` (${left_out} left out)` : ""}`);
  return `${lists.join(", ")}, as seen by ${models.map(({ name }) => name).join(" and ")}`;
}

start();
