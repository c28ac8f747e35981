// A timeline with a tick for each chunk of the answer, from the request on. The gap before the first is the time to
// first token; later gaps are waits for the model or the queue.

import { useEffect, useRef } from "../vendor/hooks.js";
import { html } from "../html.js";
import { duration } from "../text.js";

export function Arrivals({ live }) {
  const canvas = useRef(null);
  const { beat, status, meter } = live;
  const running = live.running;
  const draw = () => {
    const element = canvas.current;
    if (!element) return;
    const { clientWidth: width, clientHeight: height } = element;
    const scale = devicePixelRatio || 1;
    element.width = width * scale;
    element.height = height * scale;
    const context = element.getContext("2d");
    const style = getComputedStyle(element);
    context.scale(scale, scale);
    const last = meter.arrivals.at(-1) ?? 0;
    const end = Math.max(live.running ? meter.elapsed : last, last, 0.05);
    const at = (seconds) => Math.min((seconds / end) * (width - 1), width - 1);
    context.fillStyle = style.getPropertyValue("--line");
    context.fillRect(0, height - 1, width, 1);
    if (meter.first !== null) {
      context.fillStyle = style.getPropertyValue("--wait");
      context.fillRect(0, height - 3, at(meter.first), 3);
    }
    context.fillStyle = style.getPropertyValue("--accent");
    // When ticks touch, transparency keeps their density visible.
    context.globalAlpha = meter.arrivals.length > width / 2 ? 0.35 : 0.8;
    for (const seconds of meter.arrivals) context.fillRect(at(seconds), 2, 1, height - 3);
  };
  useEffect(draw, [beat.value, status.value]);
  useEffect(() => {
    addEventListener("resize", draw);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", draw);
    const timer = running ? setInterval(draw, 100) : null;
    return () => {
      removeEventListener("resize", draw);
      dark.removeEventListener("change", draw);
      clearInterval(timer);
    };
  }, [running]);
  const label = `Arrival times of ${meter.arrivals.length} chunks; the first after ${duration(meter.first)}`;
  return html`<canvas class="arrivals" ref=${canvas} role="img" aria-label=${label} title=${label}></canvas>`;
}
