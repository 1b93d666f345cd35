// Saves what the plot shows as CSV, SVG, PNG or a page of its own. Runs in one function with reward_plot.js, after it,
// and uses its `root`, `plot`, `view` and `visible`.
function save(name, type, content) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function csv() {
  const rows = view().rows || [];
  if (!rows.length) return '';
  const names = Object.keys(rows[0]);
  const cell = (v) => (v === null || v === undefined ? '' : /[",\n]/.test(`${v}`) ? `"${`${v}`.replaceAll('"', '""')}"` : `${v}`);
  return [names.join(','), ...rows.map((r) => names.map((n) => cell(r[n])).join(','))].join('\n') + '\n';
}

// Exported figures are for paper: dark ink on white, whatever the page's theme is.
function printed() {
  const layout = structuredClone(view().figure.layout);
  const data = structuredClone(view().figure.data);
  const paint = (o) => { if (o && o.color === 'soft') o.color = '#666'; };
  (layout.annotations || []).forEach((a) => paint(a.font));
  (layout.shapes || []).forEach((s) => paint(s.line));
  data.forEach((d) => { paint(d.line); paint(d.marker); d.visible = visible(d); });
  Object.assign(layout, { paper_bgcolor: '#fff', plot_bgcolor: '#fff', font: { family: 'sans-serif', size: 12, color: '#222' } });
  layout.height = height;
  return { data, layout };
}

async function exported(kind) {
  const stem = root.dataset.name;
  const { data, layout } = printed();
  if (kind === 'csv') save(`${stem}.csv`, 'text/csv', csv());
  else if (kind === 'html') {
    const source = [...document.scripts].find((s) => s.src.endsWith('plotly.min.js')).src;
    const library = (await (await fetch(source)).text()).replaceAll('</script', '<\\/script');
    const json = JSON.stringify({ data, layout }).replaceAll('<', '\\u003c');
    save(`${stem}.html`, 'text/html', '<!doctype html><meta charset="utf-8"><title>Preference Lab</title><div id="plot"></div>'
      + `<script>${library}</` + `script><script>const f=${json};Plotly.newPlot("plot",f.data,f.layout,{responsive:true})</` + 'script>');
  } else {
    const width = Math.max(720, plot.clientWidth);
    await Plotly.downloadImage({ data, layout }, { format: kind, width, height, scale: kind === 'png' ? 2 : 1, filename: stem });
  }
}
root.querySelectorAll('[data-export]').forEach((b) => { b.onclick = () => exported(b.dataset.export); });
