"use strict";
// Tables sort by the button in a header, and are downloaded as CSV. On paper, those with too many
// columns become several. Without this script the page shows the same tables.

const cellsOf = (row) => [...row.cells];
const exact = (cell) => cell.dataset.value ?? cell.textContent;

function sortBy(table, column, descending) {
  const isNumber = (text) => text !== "" && Number.isFinite(Number(text));
  const compare = (first, second) => {
    const [a, b] = [first, second].map((row) => exact(row.cells[column]));
    if (a === "" || b === "") return (a === "") - (b === ""); // unknown ones last, either way
    const order = isNumber(a) && isNumber(b) ? Number(a) - Number(b) : a.localeCompare(b);
    return descending ? -order : order;
  };
  const rows = [...table.tBodies[0].rows].sort(compare);
  table.tBodies[0].append(...rows);
  cellsOf(table.tHead.rows[0]).forEach((header, place) => {
    header.setAttribute("aria-sort", place !== column ? "none" : descending ? "descending" : "ascending");
  });
}

function csvOf(table) {
  const quoted = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const named = (cell) => cell.dataset.name ?? cell.textContent.trim(); // each once
  const header = cellsOf(table.tHead.rows[0]).map(named);
  const rows = [...table.tBodies[0].rows].map((row) => cellsOf(row).map(exact));
  return [header, ...rows].map((row) => row.map(quoted).join(",")).join("\r\n") + "\r\n";
}

function download(table) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csvOf(table)], { type: "text/csv;charset=utf-8" }));
  link.download = `${table.id}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const MOST_COLUMNS = 17; // that can be read side by side on paper

function parted(table) {
  const others = table.tHead.rows[0].cells.length - 1; // the first names the row, in every part
  const each = Math.ceil(others / Math.ceil(others / (MOST_COLUMNS - 1)));
  if (each >= others) return;
  for (let start = 1; start <= others; start += each) {
    const part = table.cloneNode(true);
    part.removeAttribute("id");
    part.classList.add("part");
    for (const row of part.rows) {
      const unwanted = (place) => place > 0 && (place < start || place >= start + each);
      cellsOf(row).filter((_, place) => unwanted(place)).forEach((cell) => cell.remove());
    }
    table.before(part);
  }
  table.hidden = true;
}

function whole() {
  document.querySelectorAll("table.part").forEach((part) => part.remove());
  document.querySelectorAll("table[hidden]").forEach((table) => { table.hidden = false; });
}

addEventListener("beforeprint", () => {
  whole(); // a browser may tell twice
  document.querySelectorAll("table").forEach(parted);
});
addEventListener("afterprint", whole);

for (const table of document.querySelectorAll("table")) {
  cellsOf(table.tHead.rows[0]).forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      sortBy(table, column, header.getAttribute("aria-sort") === "ascending");
    });
  });
}
for (const button of document.querySelectorAll("button.csv")) {
  button.hidden = false;
  button.addEventListener("click", () => download(document.getElementById(button.dataset.table)));
}
