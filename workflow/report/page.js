// Says what is under the pointer, and opens everything for paper.
(() => {
  "use strict";
  const tip = document.body.appendChild(document.createElement("div"));
  tip.className = "tip";

  function say(event) {
    const mark = event.target.closest?.(".figure [aria-label]");
    tip.classList.toggle("shown", Boolean(mark));
    if (!mark) return;
    tip.textContent = mark.getAttribute("aria-label");
    const { width, height } = tip.getBoundingClientRect();
    const above = event.clientY - height - 14;
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 12, document.documentElement.clientWidth - width - 8))}px`;
    tip.style.top = `${above > 8 ? above : event.clientY + 18}px`;
  }
  for (const kind of ["pointermove", "pointerdown"]) addEventListener(kind, say);
  for (const kind of ["scroll", "pointerleave"]) document.addEventListener(kind, () => tip.classList.remove("shown"));

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });
})();
