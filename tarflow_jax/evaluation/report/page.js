// Draws the charts in the colours of the page, and plays the films.
document.documentElement.classList.add('js');
addEventListener('DOMContentLoaded', () => {
  const calm = matchMedia('(prefers-reduced-motion: reduce)');
  const dark = matchMedia('(prefers-color-scheme: dark)');
  const coarse = matchMedia('(pointer: coarse)');

  // Charts.
  const charts = [...document.querySelectorAll('.chart')].map((box) => {
    const data = JSON.parse(box.querySelector('script').textContent);
    const plot = document.createElement('div');
    box.append(plot);
    return { box, plot, data };
  });
  let hours = false;

  function draw({ plot, data, box }) {
    const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const narrow = box.clientWidth < 420;
    const timed = hours && data.hours;
    const axis = {
      gridcolor: colour('--line'), linecolor: colour('--line'), zerolinecolor: colour('--line'),
      automargin: true, ticks: 'outside', tickcolor: colour('--line'), nticks: narrow ? 5 : 8,
    };
    const traces = data.traces.map((trace) => trace.type === 'heatmap'
      ? { ...trace, colorscale: [[0, colour('--paper')], [1, colour('--accent')]] }
      : { ...trace, opacity: trace.opacity && dark.matches ? 0.75 : trace.opacity,
        x: timed ? trace.meta.hours : trace.x, hovertemplate: trace.text ? '%{y:.4g}, %{text}' : '%{y:.5g}' });
    const heat = data.traces.some((trace) => trace.type === 'heatmap');
    Plotly.react(plot, traces, {
      width: box.clientWidth, height: narrow ? 330 : 360, margin: { l: 48, r: 14, t: 8, b: 44 },
      paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
      font: { size: 13, color: colour('--soft'), family: 'system-ui, sans-serif' },
      hovermode: heat ? 'closest' : 'x unified',
      hoverlabel: { bgcolor: colour('--paper'), bordercolor: colour('--line'), font: { color: colour('--ink') } },
      dragmode: coarse.matches ? false : 'zoom',
      showlegend: data.traces.length > 1,
      legend: { orientation: 'h', x: 0, y: 1.02, yanchor: 'bottom', font: { color: colour('--ink') } },
      xaxis: { ...axis, title: { text: timed ? 'hours of training' : data.x }, type: data.log ? 'log' : 'linear', ...(data.unit ? { range: [0, 1.03] } : {}) },
      yaxis: { ...axis, title: { text: data.y }, ...(data.unit ? { range: [0, 1.03] } : {}), ...(heat ? { autorange: 'reversed' } : {}) },
    }, { displayModeBar: false, responsive: false });
  }

  charts.forEach(draw);
  // Also when the window narrows: a chart must not hold its column open.
  const watch = new ResizeObserver((entries) => entries.forEach(({ target }) => {
    const chart = charts.find(({ box }) => box === target);
    if (chart.width !== target.clientWidth) {
      chart.width = target.clientWidth;
      draw(chart);
    }
  }));
  charts.forEach((chart) => { chart.width = chart.box.clientWidth; watch.observe(chart.box); });
  dark.addEventListener('change', () => charts.forEach(draw));
  for (const input of document.querySelectorAll('input[name=axis]')) {
    input.addEventListener('change', () => {
      hours = input.value === 'hours';
      charts.filter(({ data }) => data.hours).forEach(draw);
    });
  }

  // Films.
  for (const film of document.querySelectorAll('.film')) {
    const labels = JSON.parse(film.dataset.labels);
    const image = film.querySelector('img');
    const label = film.querySelector('.label');
    const button = film.querySelector('button');
    const slider = film.querySelector('input');
    const pace = Math.max(80, Math.min(700, 5000 / labels.length)); // milliseconds a frame
    let timer = null;

    const show = (frame) => {
      slider.value = frame;
      slider.setAttribute('aria-valuetext', labels[frame]);
      image.style.transform = `translateY(${-100 * frame / labels.length}%)`;
      label.textContent = labels[frame];
    };
    const stop = () => {
      clearInterval(timer);
      timer = null;
      button.textContent = 'Play';
    };
    const play = () => {
      let frame = Number(slider.value);
      frame = frame === labels.length - 1 ? 0 : frame;
      show(frame);
      button.textContent = 'Pause';
      timer = setInterval(() => {
        frame += 1;
        show(frame);
        if (frame === labels.length - 1) stop();
      }, pace);
    };
    button.addEventListener('click', () => (timer === null ? play() : stop()));
    slider.addEventListener('input', () => { stop(); show(Number(slider.value)); });
    show(Number(slider.value));
    // Once, when it comes into view, unless the reader asked for less motion.
    const seen = new IntersectionObserver((entries) => {
      if (entries.some((entry) => entry.isIntersecting)) {
        seen.disconnect();
        if (!calm.matches && timer === null) play();
      }
    }, { threshold: 0.8 });
    seen.observe(film.querySelector('.stage'));
  }
});
