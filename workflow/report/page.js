// Draws the figures with the page's colours, and again when these change: light, dark, paper.
(() => {
  "use strict";
  const figures = [...document.querySelectorAll("[data-figure]")];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const PAPER_WIDTH = 660;
  const MANY_POINTS = 3000;

  const webgl = (() => {
    try {
      return Boolean(document.createElement("canvas").getContext("webgl"));
    } catch {
      return false;
    }
  })();

  // `var(--blue)` becomes what the page means by it now.
  function inColour(value, style) {
    if (typeof value === "string") {
      const name = /^var\((--[\w-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => inColour(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, inColour(item, style)]));
    }
    return value;
  }

  function fitted(figure, width) {
    const points = figure.data.reduce((sum, trace) => sum + (trace.text?.length ?? 0), 0);
    for (const trace of figure.data) {
      if (trace.type === "scatter" && webgl && points > MANY_POINTS) trace.type = "scattergl";
      if (trace.type === "sankey" && width < 520) {
        trace.node.pad = 18;
        trace.textfont = { size: 11 };
      }
    }
    if (width < 520) figure.layout.font.size = 11;
    // A finger that moves over a figure scrolls the page.
    if (touch) figure.layout.dragmode = false;
    return figure;
  }

  function draw(width) {
    const style = getComputedStyle(document.documentElement);
    for (const place of figures) {
      const figure = JSON.parse(document.getElementById(`data-${place.dataset.figure}`).textContent);
      const { data, layout } = fitted(inColour(figure, style), width ?? place.clientWidth);
      if (width) layout.width = width;
      Plotly.react(place, data, layout, {
        responsive: !width,
        displaylogo: false,
        displayModeBar: !touch,
        modeBarButtons: [data[0].type === "sankey" ? ["toImage"] : ["toImage", "zoom2d", "pan2d", "resetScale2d"]],
      });
    }
  }

  draw();
  dark.addEventListener("change", () => draw());
  let opened = [];
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("printing");
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const details of opened) details.open = true;
    draw(PAPER_WIDTH);
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("printing");
    for (const details of opened) details.open = false;
    draw();
  });
})();
