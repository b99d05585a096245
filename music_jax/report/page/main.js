// Draws the charts from the page's data.

async function main() {
  const [library, text] = await Promise.all([inflated("library"), inflated("data")]);
  document.head.append(make("script", { text: library }));
  const data = JSON.parse(text);
  data.runs = data.runs.map(unpackedAll);
  document.body.classList.toggle("several", data.runs.length > 1);
  followTheme();
  drawCurves(data);
  $$("table.sortable").forEach(makeSortable);
  const within = (section, index) => $(`#${section} [data-run="${index}"]`);
  data.runs.forEach((run, index) => {
    if (run.segments) {
      drawSegments(run, within("segments", index));
      drawUnits(run, within("units", index));
      drawStrips(run, within("learned", index));
    }
    if (run.images) {
      drawNeighbors(run, within("neighbors", index));
      drawViews(run, within("views", index));
      if (Object.keys(run.maps).length) drawMap(run, within("map", index));
    }
    if (run.confusion) drawConfusion(run, within("confusions", index));
    if (run.mistakes) drawMistakes(run, within("confusions", index));
  });
  drawTryIt(data);
  followPrinting();
  document.documentElement.dataset.ready = "true";
}

main().catch((error) => {
  const place = $("#failed");
  place.textContent = `The charts cannot be drawn (${error.message}); they need a browser from 2023 or later.`;
  place.hidden = false;
  console.error(error);
});
