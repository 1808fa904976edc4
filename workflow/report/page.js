// Draws the figures with the page's colours, and again when these change: light, dark, paper.
(() => {
  "use strict";
  const figures = [...document.querySelectorAll("[data-figure]")];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const PAPER_WIDTH = 660;
  const NARROW = 520;
  const MANY_POINTS = 3000;

  function hasWebgl() {
    try {
      return Boolean(document.createElement("canvas").getContext("webgl"));
    } catch {
      return false;
    }
  }

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
    const { data, layout } = figure;
    const points = data.reduce((sum, trace) => sum + (trace.type === "scatter" ? trace.text?.length ?? 0 : 0), 0);
    if (points > MANY_POINTS && hasWebgl()) {
      for (const trace of data) trace.type = "scattergl";
    }
    if (width < NARROW) {
      layout.font.size = 11;
      // Here a legend has a line for each of its entries.
      const lines = data.filter((trace) => trace.name && trace.showlegend !== false).length;
      layout.margin.t += 17 * Math.max(lines - 1, 0);
      layout.height += 17 * lines;
      if (data[0].type === "sankey") {
        data[0].textfont = { size: 9.5 };
        // Lower, so as not to meet the words of the last column.
        data[0].node.label = data[0].node.label.map((text) => text.replace(/^(?=Computed|Reused)/, "<br><br><br>"));
        Object.assign(layout.margin, { l: 0, r: 0 });
      }
      if (layout.xaxis) Object.assign(layout.xaxis, { nticks: 4, tickangle: 0 });
    }
    // A finger that moves over a figure scrolls the page.
    if (touch) layout.dragmode = false;
    return figure;
  }

  function draw(width) {
    const style = getComputedStyle(document.documentElement);
    for (const place of figures) {
      const figure = JSON.parse(document.getElementById(`data-${place.dataset.figure}`).textContent);
      const { data, layout } = fitted(inColour(figure, style), width ?? place.clientWidth);
      place.style.height = `${layout.height}px`;
      if (width) layout.width = width;
      // Drawn from nothing: a flow that changes would still be moving when the page is printed.
      Plotly.purge(place);
      Plotly.newPlot(place, data, layout, {
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
