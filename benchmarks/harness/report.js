"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const now = head.getAttribute("aria-sort");
    const first = head.dataset.first === "descending" ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = now === first ? other : first;
    heads.forEach(each => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter(row => !row.classList.contains("set"));
      const key = row => row.cells[column].dataset.value;
      rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const [u, v] = [Number(x), Number(y)];
        const least = Number.isNaN(u) || Number.isNaN(v) ? x.localeCompare(y) : u - v;
        return order === "ascending" ? least : -least;
      });
      body.append(...rows);
    }
  }));
}

const tasks = JSON.parse(document.getElementById("pictures").textContent);
const byId = name => document.getElementById(name);
if (tasks.length) {
  const [task, image, left, right, split] = ["task", "image", "left", "right", "split"].map(byId);
  const make = (name, text) => Object.assign(document.createElement(name), { textContent: text || "" });
  const fill = (select, names) => {
    select.replaceChildren(...names.map((name, value) => Object.assign(make("option", name), { value })));
  };
  const now = () => tasks[task.value];
  const picture = (source, name) => source
    ? Object.assign(make("img"), { src: source, alt: name })
    : Object.assign(make("div", "no picture"), { className: "missing" });
  const panel = each => {
    const figure = make("figure");
    const caption = make("figcaption");
    caption.append(make("b", each.title), each.notes[image.value] || "");
    figure.append(picture(each.images[image.value], each.title), caption);
    return figure;
  };
  const compare = () => {
    const [a, b] = [now().columns[left.value], now().columns[right.value]];
    const line = make("i");
    line.style.left = `calc(${split.value}% - 1px)`;
    const over = picture(b.images[image.value], b.title);
    over.style.clipPath = `inset(0 0 0 ${split.value}%)`;
    byId("lens").replaceChildren(picture(a.images[image.value], a.title), over, line);
  };
  const show = () => {
    const chosen = [...document.querySelectorAll("#methods input")].map(each => each.checked);
    byId("panels").replaceChildren(...now().columns.filter((_, at) => at < 2 || chosen[at - 2]).map(panel));
    compare();
  };
  const start = () => {
    const columns = now().columns;
    fill(image, now().names);
    fill(left, columns.map(each => each.title));
    fill(right, columns.map(each => each.title));
    [left.value, right.value] = [1, Math.max(1, columns.findIndex(each => each.chosen))];
    byId("methods").replaceChildren(...columns.slice(2).map(each => {
      const [label, box] = [make("label"), make("input")];
      Object.assign(box, { type: "checkbox", checked: each.chosen });
      box.addEventListener("change", show);
      label.append(box, each.title);
      return label;
    }));
    show();
  };
  fill(task, tasks.map(each => each.title));
  task.addEventListener("change", start);
  image.addEventListener("change", show);
  for (const each of [left, right]) each.addEventListener("change", compare);
  split.addEventListener("input", compare);
  start();
}
