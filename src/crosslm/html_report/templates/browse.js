// Sorting and filtering of the synthetic texts. Without it the whole table is there, best first.
"use strict";
const table = document.getElementById("texts");
if (table) {
  const body = table.tBodies[0], rows = Array.from(body.rows), filters = document.getElementById("filters");
  const said = document.getElementById("found"), more = document.getElementById("more");
  const STEP = 100;
  let shown = STEP;
  const cell = (row, column) => row.cells[column].textContent.trim();
  const figure = (text) => parseFloat(text.replace("\u2212", "-"));
  const chosen = (name) => filters.elements[name].value;
  const lower = rows.map((row) => cell(row, 0).toLowerCase());
  const place = new Map(rows.map((row, number) => [row, number]));

  function show() {
    const words = chosen("words").toLowerCase(), found = [];
    for (const row of body.rows) {
      const fits = (!words || lower[place.get(row)].includes(words))
        && (!chosen("arrival") || cell(row, 1) === chosen("arrival"))
        && (!chosen("label") || cell(row, 2) === chosen("label"))
        && (!chosen("kept") || cell(row, 7) === chosen("kept"));
      if (fits) found.push(row);
      row.hidden = !fits || found.length > shown;
    }
    said.textContent = `${found.length} of ${rows.length} texts` +
      (found.length > shown ? `, the first ${shown} shown` : "");
    more.hidden = found.length <= shown;
  }

  function sort(head) {
    const column = head.cellIndex, numeric = head.dataset.kind === "number";
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = new Map(rows.map((row) => [row, numeric ? figure(cell(row, column)) : cell(row, column)]));
    const sorted = [...rows].sort((one, two) => {
      const a = key.get(one), b = key.get(two);
      const order = numeric ? a - b : a.localeCompare(b);
      return (down ? -order : order) || place.get(one) - place.get(two);
    });
    body.append(...sorted);
    show();
  }

  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(head));
    head.replaceChildren(button);
  }
  filters.hidden = false;
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("input", () => { shown = STEP; show(); });
  more.addEventListener("click", () => { shown += 5 * STEP; show(); });
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
  show();
}
