// What the page does beyond standing there: theme, contestants, values under the pointer and under the arrow keys.
(() => {
  "use strict";
  const root = document.documentElement;
  for (const control of document.querySelectorAll("[data-script]")) control.hidden = false;

  // ---- theme: as the system says, or as chosen; kept where the browser lets a page keep something
  const themes = document.querySelectorAll("input[name=theme]");
  const show = (theme) => {
    if (theme === "system") delete root.dataset.theme;
    else root.dataset.theme = theme;
  };
  let kept = "system";
  try { kept = localStorage.getItem("mpq-theme") || kept; } catch { /* files may have no storage */ }
  for (const input of themes) {
    input.checked = input.value === kept;
    input.addEventListener("change", () => {
      show(input.value);
      try { localStorage.setItem("mpq-theme", input.value); } catch { /* as above */ }
    });
  }
  show(kept);

  // ---- which contestant's bits are drawn as lines
  for (const input of document.querySelectorAll("input[name=beside]")) {
    const draw = () => {
      for (const group of document.querySelectorAll("[data-contestant]")) {
        if (group.dataset.contestant === input.value) group.removeAttribute("hidden");
        else group.setAttribute("hidden", "");
      }
    };
    input.addEventListener("change", draw);
    if (input.checked) draw();
  }

  // ---- values: one tip for all plots, said aloud as well
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  document.body.append(tip);
  let active = null;

  const hide = () => {
    if (active) active.classList.remove("on");
    active = null;
    tip.hidden = true;
  };
  const tell = (mark) => {
    if (mark === active) return;
    hide();
    active = mark;
    mark.classList.add("on");
    // Drawn after its neighbours, so that they do not cover its edge.
    const over = mark.querySelector(".cell") && mark.parentNode.querySelector(".pick");
    if (over) mark.parentNode.insertBefore(mark, over);
    const [first, ...rest] = mark.dataset.tip.split("\n");
    const name = document.createElement("b");
    name.textContent = first;
    tip.replaceChildren(name, rest.join("\n"));
    tip.hidden = false;
    const at = mark.getBoundingClientRect(), own = tip.getBoundingClientRect(), edge = 8;
    const left = at.left + at.width / 2 - own.width / 2;
    const above = at.top - own.height - edge;
    tip.style.left = `${Math.max(edge, Math.min(left, innerWidth - own.width - edge))}px`;
    tip.style.top = `${above >= edge ? above : Math.min(at.bottom + edge, innerHeight - own.height - edge)}px`;
  };

  const nearest = (marks, row, column) =>
    marks.filter((mark) => +mark.dataset.row === row)
      .sort((a, b) => Math.abs(a.dataset.column - column) - Math.abs(b.dataset.column - column))[0];
  const beyond = (marks, from, key) => {
    const row = +from.dataset.row, column = +from.dataset.column;
    const along = marks.filter((mark) => +mark.dataset.row === row);
    const rows = [...new Set(marks.map((mark) => +mark.dataset.row))].sort((a, b) => a - b);
    const up = key === "ArrowUp", back = key === "ArrowLeft";
    if (key === "Home") return along[0];
    if (key === "End") return along.at(-1);
    if ((up || key === "ArrowDown") && rows.length > 1) {
      return nearest(marks, rows[rows.indexOf(row) + (up ? -1 : 1)], column) || from;
    }
    return along[along.indexOf(from) + (back || up ? -1 : 1)] || from;
  };

  for (const field of document.querySelectorAll("svg.field")) {
    const marks = [...field.querySelectorAll(".mark")];
    if (!marks.length) continue;
    for (const mark of marks) {
      // Without this script the browser shows titles; with it, both would appear.
      const title = mark.querySelector("title");
      mark.dataset.tip = title.textContent;
      title.remove();
    }
    const over = (event) => {
      const mark = event.target.closest(".mark");
      if (mark) tell(mark); else hide();
    };
    field.addEventListener("pointermove", over);
    field.addEventListener("click", over);
    field.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
    field.setAttribute("tabindex", "0");
    field.setAttribute("aria-describedby", "keys");
    let last = marks[0];
    field.addEventListener("focus", () => { if (field.matches(":focus-visible")) tell(last); });
    field.addEventListener("blur", hide);
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return hide();
      if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) return;
      event.preventDefault();
      last = active && marks.includes(active) ? beyond(marks, active, event.key) : last;
      last.scrollIntoView({ block: "nearest", inline: "nearest" });
      tell(last);
    });
  }
  addEventListener("scroll", (event) => { if (event.target === document && !document.activeElement.matches(".field")) hide(); }, true);

  // ---- paper has no summary to open
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const each of closed) each.open = true;
  });
  addEventListener("afterprint", () => { for (const each of closed) each.open = false; });
})();
