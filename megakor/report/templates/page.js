(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const media = (query) => window.matchMedia(query);
  const touch = media("(pointer: coarse)");
  const narrow = media("(max-width: 48rem)");

  /* A figure in the colours of the theme: a trace's `meta` names a CSS variable. */
  function themed(figure) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue("--" + name).trim();
    const { data, layout } = structuredClone(figure);
    for (const trace of data) {
      const own = colour(trace.meta);
      trace.line = { ...trace.line, color: own };
      trace.marker = { ...trace.marker, color: own };
    }
    for (const shape of layout.shapes || []) {
      shape.line.color = colour("muted");
      if (shape.type === "rect") shape.fillcolor = colour("band");
    }
    for (const note of layout.annotations || []) note.font = { size: 11, color: colour("muted") };
    const family = getComputedStyle(document.body).fontFamily;
    Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family, size: 12, color: colour("muted") },
      hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), font: { family, color: colour("text") } },
      dragmode: touch.matches ? false : "zoom",
    });
    layout.xaxis.linecolor = colour("line");
    layout.xaxis.showline = true;
    layout.yaxis.gridcolor = colour("grid");
    if (narrow.matches) layout.height = Math.min(layout.height, 300);
    return { data, layout };
  }

  function draw() {
    for (const [id, figure] of Object.entries(figures)) {
      const { data, layout } = themed(figure);
      Plotly.react(id, data, layout, { responsive: true, displayModeBar: false });
    }
  }

  draw();
  for (const query of [media("(prefers-color-scheme: dark)"), narrow]) query.addEventListener("change", draw);
})();
