// Sorts and searches the rows of a report, and opens their maps.
(() => {
  "use strict";
  const at = (id) => document.getElementById(id);
  const list = at("rows");
  const rows = [...list.children];
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const STEP = 25;
  let most = STEP; // rows that are shown at once

  function show() {
    const words = at("search").value.toLowerCase().split(/\s+/);
    let found = 0;
    for (const row of list.children) {
      const fits = words.every((word) => texts.get(row).includes(word));
      row.hidden = !fits || found >= most;
      found += fits;
    }
    at("found").textContent = `${Math.min(found, most)} of ${found} rows shown`;
    at("more").hidden = found <= most;
  }

  function sort() {
    const [key, sign] = at("order").value.split(" ");
    const value = (row) => (key in row.dataset ? sign * row.dataset[key] : Infinity);
    list.append(...rows.sort((a, b) => (value(a) < value(b) ? -1 : Number(value(a) > value(b)))));
    show();
  }

  at("order").addEventListener("change", sort);
  at("search").addEventListener("input", show);
  at("more").addEventListener("click", () => {
    most += 4 * STEP;
    show();
  });
  at("rows-controls").addEventListener("submit", (event) => event.preventDefault());
  at("rows-controls").hidden = false;
  show();

  const dialog = at("map-dialog");
  for (const button of document.querySelectorAll("[data-map]")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      at("map-title").textContent = button.getAttribute("aria-label");
      const question = button.closest("article").querySelector(".question");
      at("map-question").textContent = question ? question.textContent : "";
      dialog.showModal();
      showMap(JSON.parse(at(button.dataset.map).textContent));
    });
  }
  at("map-close")?.addEventListener("click", () => dialog.close());
})();
