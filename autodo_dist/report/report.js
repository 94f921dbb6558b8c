"use strict";
// Sortable, filtered tables and the gallery of suspected labels. Text of a run reaches the page as text alone.

const PAGE = 48; // tiles that are added together

function element(tag, properties = {}, children = []) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// --- tables

function sortable(table) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, column) => {
    const button = element("button", { type: "button", title: "sort" }, [...head.childNodes]);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const numbers = [...body.rows].some((row) => row.cells[column].dataset.v !== undefined);
      const compare = numbers ? (a, b) => Number(a) - Number(b) : (a, b) => a.localeCompare(b, undefined, { numeric: true });
      const rows = [...body.rows].sort((a, b) => {
        const [first, second] = [value(a), value(b)];
        if (numbers && (first === "" || second === "")) return (first === "") - (second === ""); // unknown comes last
        return up ? compare(first, second) : compare(second, first);
      });
      body.append(...rows);
    });
  });
}

function filtered(table) {
  const what = table.dataset.filter;
  const box = element("input", { type: "search", placeholder: `filter by ${what}`, ariaLabel: `filter by ${what}` });
  table.parentElement.before(box);
  box.addEventListener("input", () => {
    const wanted = box.value.toLocaleLowerCase();
    for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLocaleLowerCase().includes(wanted);
  });
}

document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll("table[data-filter]").forEach((table) => table.tBodies[0].rows.length > 12 && filtered(table));

// --- galleries

// Ticks and new labels of one gallery, in the browser's storage where it lets us.
class Choice {
  constructor(gallery, warn) {
    this.place = gallery.store;
    this.warn = warn;
    this.ticks = new Set();
    this.labels = new Map(); // id -> new label, where it is not the suggested one
    const known = new Set(gallery.suspects.map((it) => it.id));
    try {
      const kept = JSON.parse(localStorage.getItem(this.place) ?? "{}");
      for (const id of kept.ticks ?? []) if (known.has(id)) this.ticks.add(id);
      for (const [id, label] of kept.labels ?? []) if (known.has(id)) this.labels.set(id, String(label));
    } catch {
      this.refused();
    }
  }
  keep() {
    try {
      localStorage.setItem(this.place, JSON.stringify({ ticks: [...this.ticks], labels: [...this.labels] }));
    } catch {
      this.refused();
    }
  }
  refused() {
    this.warn("This browser does not let the page keep ticks: download them before you close or reload it.");
  }
  label(it) {
    return this.labels.get(it.id) ?? (it.suggested !== null && it.suggested !== it.given ? it.suggested : "");
  }
}

const number = (value) => value.toPrecision(2);
const share = (value) => (value === null ? "" : value.toFixed(2));

const ORDERS = {
  "score, highest first": (a, b) => b.score - a.score,
  "weight, lowest first": (a, b) => (a.weight ?? 0) - (b.weight ?? 0),
  "suggestion's probability, highest first": (a, b) => (b.probability ?? 0) - (a.probability ?? 0),
  "given label": (a, b) => a.given.localeCompare(b.given, undefined, { numeric: true }) || b.score - a.score,
  "suggestion": (a, b) => (a.suggested ?? "").localeCompare(b.suggested ?? "", undefined, { numeric: true }) || b.score - a.score,
  "id": (a, b) => a.id - b.id,
};

function csv(rows) {
  const field = (value) => (/[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  return rows.map((row) => row.map(field).join(",") + "\r\n").join("");
}

function download(name, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function select(name, choices) {
  const box = element("select", { ariaLabel: name }, choices.map(([value, text]) => element("option", { value, textContent: text })));
  return [box, element("label", {}, [name, box])];
}

function openGallery(gallery) {
  const root = document.querySelector(`[data-gallery="${gallery.id}"]`);
  if (!root) return;
  const storage = root.querySelector(".storage");
  const choice = new Choice(gallery, (text) => { storage.textContent = text; });
  const classes = new Set(gallery.classes);
  const tiles = root.querySelector(".tiles");
  const more = root.querySelector(".more");
  const list = element("datalist", { id: `${gallery.id}-all-classes` }, gallery.classes.map((value) => element("option", { value })));
  root.append(list);

  const any = (of) => {
    const names = [...new Set(gallery.suspects.map((it) => it[of]).filter((it) => it !== null))];
    names.sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));
    return [["", "all"], ...names.map((it) => [`=${it}`, it])];
  };
  const [order, orderLabel] = select("sort by", Object.keys(ORDERS).map((it) => [it, it]));
  const [given, givenLabel] = select("given", any("given"));
  const [suggested, suggestedLabel] = select("suggested", any("suggested"));
  const all = element("button", { type: "button", textContent: "Select all shown", className: "all" });
  const clear = element("button", { type: "button", textContent: "Clear ticks", className: "clear" });
  const save = element("button", { type: "button", textContent: "Download CSV", className: "download" });
  const count = element("span", { className: "count", ariaLive: "polite" });
  root.querySelector(".controls").append(orderLabel, givenLabel, suggestedLabel, all, clear, count, save);

  let wanted = [];
  let shown = 0;

  const complete = () => gallery.suspects.filter((it) => choice.ticks.has(it.id) && classes.has(choice.label(it)));
  function counted() {
    const lacking = choice.ticks.size - complete().length;
    const without = lacking ? `, ${lacking} without a new label` : "";
    count.textContent = `${choice.ticks.size} ticked${without} · ${shown} of ${wanted.length} shown`;
    save.disabled = complete().length === 0;
    clear.disabled = choice.ticks.size === 0;
  }

  function tile(it) {
    const box = element("input", { type: "checkbox", checked: choice.ticks.has(it.id), ariaLabel: `label of ${it.key} is wrong` });
    const image = it.picture
      ? element("img", { loading: "lazy", decoding: "async", alt: `picture ${it.key}`, title: it.key, src: it.picture })
      : element("span", { className: "none", textContent: "no picture" });
    if (it.picture) image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth <= 40));
    const name = (text) => element("bdi", { className: "name", textContent: text, title: text });
    const labels = element("p", { className: "labels" }, [element("span", { className: "given" }, [name(it.given)])]);
    if (it.suggested === it.given) labels.append(" kept", ` ${share(it.probability)}`);
    else if (it.suggested !== null) labels.append(" → ", element("b", { className: "suggested" }, [name(it.suggested)]), ` ${share(it.probability)}`);
    const facts = element("p", { className: "facts", textContent: [it.weight === null ? "" : `weight ${number(it.weight)}`, `score ${number(it.score)}`].filter(Boolean).join(" · "), title: `id ${it.id}` });
    const label = element("input", { className: "new", value: choice.label(it), placeholder: "new label", ariaLabel: `new label of ${it.key}`, autocomplete: "off" });
    label.setAttribute("list", list.id);
    const made = element("li", { className: "tile" }, [element("label", {}, [box, image]), element("p", { className: "key", textContent: it.key, title: it.key, dir: "auto" }), labels, facts, label]);
    made.dataset.id = it.id;
    const mark = () => {
      made.classList.toggle("ticked", choice.ticks.has(it.id));
      label.classList.toggle("bad", choice.ticks.has(it.id) && !classes.has(choice.label(it)));
    };
    box.addEventListener("change", () => {
      if (box.checked) choice.ticks.add(it.id); else choice.ticks.delete(it.id);
      choice.keep();
      mark();
      counted();
    });
    label.addEventListener("change", () => {
      choice.labels.set(it.id, label.value);
      choice.keep();
      mark();
      counted();
    });
    mark();
    return made;
  }

  function grow() {
    tiles.append(...wanted.slice(shown, shown + PAGE).map(tile));
    shown = Math.min(wanted.length, shown + PAGE);
    more.hidden = shown >= wanted.length;
    more.textContent = `Show more (${wanted.length - shown} left)`;
    counted();
  }

  function again() {
    const fits = (box, value) => box.value === "" || box.value === `=${value}`;
    wanted = gallery.suspects.filter((it) => fits(given, it.given) && fits(suggested, it.suggested)).sort(ORDERS[order.value]);
    tiles.replaceChildren();
    shown = 0;
    grow();
  }

  for (const box of [order, given, suggested]) box.addEventListener("change", again);
  more.addEventListener("click", grow);
  all.addEventListener("click", () => {
    for (const it of wanted.slice(0, shown)) choice.ticks.add(it.id);
    choice.keep();
    again();
  });
  clear.addEventListener("click", () => {
    choice.ticks.clear();
    choice.keep();
    again();
  });
  save.addEventListener("click", () => {
    const rows = complete().map((it) => [it.id, it.key, it.given, choice.label(it)]);
    download(gallery.file, csv([["id", "key", "given_label", "new_label"], ...rows]));
  });
  again();
}

JSON.parse(document.getElementById("galleries").textContent).forEach(openGallery);
