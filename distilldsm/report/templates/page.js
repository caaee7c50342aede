// Tables of the class "sortable": a click or Enter on a heading sorts, twice the other way round; empty values last.
// Where the table names columns to filter (data-choose, data-search), a choice and a search field stand above it.
(() => {
  "use strict";
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = text.endsWith("%") ? Number(text.slice(0, -1)) : Number(text.replace("\u2212", "-"));
    return text === "" || text === "-" ? null : Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b
    : String(a).localeCompare(String(b), undefined, { numeric: true }));

  // In a frame given as text (srcdoc) a link to a part of the page would lead to the page around it.
  for (const link of document.querySelectorAll("nav a")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      document.getElementById(link.hash.slice(1)).scrollIntoView();
    });
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        const rows = [...body.rows].map((row) => [value(row, column), row]);
        rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
        body.append(...rows.map(([, row]) => row));
      });
    });

    const conditions = [];
    const bar = document.createElement("div");
    const count = document.createElement("output");
    const apply = () => {
      let shown = 0;
      for (const row of body.rows) {
        row.hidden = !conditions.every((holds) => holds(row));
        shown += row.hidden ? 0 : 1;
      }
      count.textContent = `${shown} of ${body.rows.length} rows`;
    };
    const add = (title, control, holds) => {
      const label = document.createElement("label");
      label.append(`${title} `, control);
      bar.append(label);
      conditions.push(holds);
      control.addEventListener("input", apply);
    };
    if (table.dataset.choose !== undefined) {
      const column = Number(table.dataset.choose);
      const select = document.createElement("select");
      select.add(new Option("all", ""));
      const names = new Set([...body.rows].map((row) => row.cells[column].textContent));
      [...names].forEach((name, k) => select.add(new Option(name, String(k + 1))));
      const chosen = () => select.selectedOptions[0].text;
      add(heads[column].textContent, select, (row) => !select.value || row.cells[column].textContent === chosen());
    }
    if (table.dataset.search !== undefined) {
      const column = Number(table.dataset.search);
      const input = document.createElement("input");
      input.type = "search";
      const wanted = () => input.value.trim().toLowerCase();
      add(`${heads[column].textContent} contains`, input,
        (row) => row.cells[column].textContent.toLowerCase().includes(wanted()));
    }
    if (conditions.length) {
      bar.className = "bar";
      bar.append(count);
      table.parentElement.before(bar);
      apply();
    }
  }
})();
