// Draws the curves of the training: all runs in each chart, with the lower bound.

function drawCurves({ runs, units }) {
  const axis = $("#curves-axis");
  if (!axis) return;
  units.forEach((unit, curve) => {
    chart($(`[data-curve="${curve}"]`), (colors) => curveFigure(runs, curve, unit, axis.value, colors));
  });
  axis.addEventListener("change", () => $$("[data-curve]").forEach(redraw));
}

function curveFigure(runs, curve, unit, axis, colors) {
  const data = [];
  const levels = new Set();
  runs.forEach((run, index) => {
    const y = run.curves.values[curve];
    if (y.every((value) => value === null)) return;
    const few = y.filter((value) => value !== null).length <= 40;
    data.push({
      x: run.curves[axis],
      y,
      name: plain(run.name),
      mode: few ? "lines+markers" : "lines",
      connectgaps: true,
      line: { color: runColor(index), width: 2, dash: runDash(index) },
      marker: { size: 5 },
      hovertemplate: `${axis} %{x:.4~g}: %{y:.4~g} ${plain(unit)}${runs.length > 1 ? ` (${plain(run.name)})` : ""}<extra></extra>`,
    });
    if (run.bounds[curve] !== null) levels.add(run.bounds[curve]);
  });
  const lines = [...levels].map((level) => ({
    type: "line", xref: "paper", x0: 0, x1: 1, y0: level, y1: level,
    line: { color: colors.bad, width: 1.5, dash: "dash" },
  }));
  const notes = [...levels].map((level) => ({
    xref: "paper", x: 1, y: level, xanchor: "right", yanchor: "bottom", showarrow: false,
    text: `bound ${shown(level, 4)}`, font: { color: colors.bad, size: 12 },
  }));
  return {
    data,
    layout: {
      shapes: lines,
      annotations: notes,
      hovermode: "closest",
      xaxis: { title: { text: axis } },
      yaxis: { title: { text: plain(unit) }, range: rangeWith(data, levels), exponentformat: "power" },
    },
  };
}

// Includes the bounds in the axis, with space for their labels. An axis of zeros begins at 0.
function rangeWith(data, levels) {
  const values = [...levels, ...data.flatMap((trace) => trace.y.filter((value) => value !== null))];
  if (values.every((value) => value === 0)) return [0, 1];
  if (!levels.size) return undefined;
  const low = Math.min(...values);
  const high = Math.max(...values);
  const margin = 0.08 * (high - low || 1);
  return [low - margin, high + margin];
}
