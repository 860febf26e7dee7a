"use strict";
// The address's hash is the only state: "#verdict=corrupts&text=panic" chooses cells, "#embedded.xen.old.old-emulated" opens
// one. Whatever changes the choice changes the hash, and the hash changes the page; so links are filters, too.
(() => {
  const form = document.getElementById("filters");
  const shown = document.getElementById("shown");
  const nothing = document.getElementById("nothing");
  const fields = [...form.elements].filter((field) => field.matches("select, input"));
  const groups = [...document.querySelectorAll(".group")];
  const cells = [...document.querySelectorAll(".cell")];
  const texts = new Map();

  const has = (list, name) => ` ${list} `.includes(` ${name} `);

  // Everything that a reader sees of a cell, in small letters; made when first asked for.
  const text = (cell) => {
    if (!texts.has(cell)) {
      const around = [cell.closest(".group"), cell.closest(".row")].map((place) => place.dataset.name);
      texts.set(cell, [...around, cell.textContent].join(" ").toLowerCase());
    }
    return texts.get(cell);
  };

  const fits = (cell, choice) =>
    [...choice].every(([name, value]) =>
      name === "text"
        ? value.toLowerCase().split(/\s+/).every((word) => text(cell).includes(word))
        : has(cell.dataset[name] ?? "", value));

  const apply = (choice) => {
    for (const field of fields) {
      const value = choice.get(field.name) ?? "";
      if (field.type === "checkbox") field.checked = value !== "";
      else if (field.value !== value) field.value = value;
    }
    // A name that this page does not know chooses nothing away.
    const known = [...choice].filter(([name, value]) => value !== "" && fields.some((field) => field.name === name));
    for (const cell of cells) cell.hidden = !fits(cell, known);
    for (const group of groups) {
      for (const row of group.querySelectorAll(".row:not(.head)")) row.hidden = !row.querySelector(".cell:not([hidden])");
      group.hidden = !group.querySelector(".cell:not([hidden])");
    }
    const count = cells.filter((cell) => !cell.hidden).length;
    shown.textContent = `${count} of ${cells.length} cells`;
    nothing.hidden = count > 0;
  };

  const follow = () => {
    const hash = decodeURIComponent(location.hash.slice(1));
    const target = hash && !hash.includes("=") ? document.getElementById(hash) : null;
    if (!target) return apply(new URLSearchParams(location.hash.slice(1)));
    if (target.closest("[hidden]")) apply(new URLSearchParams());
    if (target.matches("details")) target.open = true;
    target.scrollIntoView({ block: target.matches("details") ? "center" : "start" });
  };

  // "#" alone would scroll to the top.
  const choose = (choice) => {
    const set = new URLSearchParams(choice.filter(([, value]) => value !== ""));
    location.replace(`#${set.toString() || "all"}`);
  };

  let typed = 0;
  form.addEventListener("input", (event) => {
    clearTimeout(typed);
    typed = setTimeout(() => choose([...new FormData(form)]), event.target.type === "search" ? 150 : 0);
  });
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    choose([]);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.open.addEventListener("click", () => {
    const visible = cells.filter((cell) => !cell.hidden);
    const open = visible.some((cell) => !cell.open);
    for (const cell of visible) cell.open = open;
  });
  // A second click on the same link opens its cell again.
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href^='#']");
    if (link && link.getAttribute("href") === location.hash) follow();
  });
  window.addEventListener("hashchange", follow);

  form.hidden = false;
  apply(new URLSearchParams());
  follow();
})();
