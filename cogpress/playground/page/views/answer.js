// One answer: its text as it streams in, its figures and its actions.

import { useEffect, useRef, useState } from "../vendor/hooks.js";
import { html } from "../html.js";
import { conversationOf, converses, resume } from "../chat.js";
import { layout } from "../json.js";
import { go } from "../router.js";
import { ended, figures } from "../stream.js";
import { count, duration, short, speed, when } from "../text.js";
import { announceEnd } from "../workbench.js";
import { Arrivals } from "./arrivals.js";
import { Code } from "./code.js";
import { Copy, Formatted, Notice, Status, Tabs, Text } from "./parts.js";
import { Rating } from "./rating.js";

export function Answer({ live, letter }) {
  const [tab, setTab] = useState("output");
  const [raw, setRaw] = useState(false);
  const prediction = live.prediction.value;
  const status = live.status.value;
  const text = live.text.value;
  const logs = live.logs.value;
  const done = ended(status);
  const json = done && layout(text) !== null;
  const looksJson = json || (!done && /^\s*[[{]["\s{[]/.test(text)); // so that the font does not change at the end
  const name = `answer${letter}`;
  useAnnounced(live, done);

  const tabs = [
    { id: "output", label: "Output" },
    ...(letter ? [] : [{ id: "code", label: "Code" }]),
    { id: "logs", label: "Logs", badge: logs ? count(logs.trimEnd().split("\n").length) : null },
    { id: "metrics", label: "Metrics" },
  ];
  return html`
    <article class="answer" aria-busy=${String(!done)} data-status=${status}>
      <header class="answer-head">
        ${letter && html`<span class="letter">${letter}</span>`}
        <${Status} status=${status} />
        <span class="answer-who">${live.label}</span>
        ${prediction && html`
          <a class="answer-id" href=${`/p/${prediction.id}`} title="Permalink of this prediction">
            ${short(prediction.id).slice(0, 12)}
          </a>
          <time datetime=${prediction.created_at} title=${prediction.created_at}>${when(prediction.created_at)}</time>`}
      </header>
      <${Figures} live=${live} />
      <${Tabs} name=${name} label="Answer" tabs=${tabs} active=${tab} onChange=${setTab}>
        ${tab === "output" &&
        html`<${Output} ...${{ live, text, json, looksJson, raw, status, done, narrow: Boolean(letter) }} />`}
        ${tab === "code" && html`<${Code} />`}
        ${tab === "logs" &&
        (logs
          ? html`<pre class="logs" dir="auto"><${Text} text=${logs} /></pre>`
          : html`<p class="nothing">No logs.</p>`)}
        ${tab === "metrics" && html`<${Metrics} prediction=${prediction} />`}
      </${Tabs}>
      ${prediction && html`<footer class="answer-foot">
        ${tab === "output" && html`
          ${!done && letter &&
          html`<button type="button" class="button quiet" onClick=${() => live.cancel()}>Cancel</button>`}
          ${text && html`<${Copy} quiet text=${text} label="Copy output" />`}
          ${json && html`<button type="button" class="button quiet" aria-pressed=${String(raw)}
            onClick=${() => setRaw(!raw)}>Show raw</button>`}`}
        <${Copy} quiet text=${() => `${location.origin}/p/${prediction.id}`} label="Copy link" />
        ${done && !letter && converses.value && conversationOf(prediction) &&
        html`<button type="button" class="button quiet"
          onClick=${() => (resume(prediction, live), go("/?view=chat"))}>Continue as a chat</button>`}
        ${done && !letter && html`<button type="button" class="button quiet" onClick=${tweak}>Tweak and rerun</button>
          <a class="button quiet" href=${`/?view=history&with=${prediction.id}`}>Compare…</a>`}
      </footer>`}
      ${prediction && done && (text || status === "succeeded") && tab === "output" &&
      html`<${Rating} id=${prediction.id} answer=${text} key=${prediction.id} />`}
    </article>
  `;
}

/** Focus the question for editing. */
function tweak() {
  const control = document.querySelector(".form .field textarea, .form .field input");
  control?.focus();
  control?.scrollIntoView({ block: "center" });
  if (control?.setSelectionRange) control.setSelectionRange(control.value.length, control.value.length);
}

/** Announce how an answer ended, once it does. */
export function useAnnounced(live, done) {
  const before = useRef(done);
  useEffect(() => {
    if (done && !before.current) announceEnd(live);
    before.current = done;
  }, [done]);
}

/** Keep the end of a growing answer in view, unless the user has scrolled away. */
export function useFollowing(text, done) {
  const end = useRef(null);
  const follow = useRef(!done);
  const left = useRef(0); // where the scroller was seen last
  useEffect(() => {
    if (!end.current || done) return undefined;
    follow.current = true;
    left.current = 0;
    const shown = end.current; // which is gone before the listener is, where another view follows while it scrolls
    const { scroller, target } = scrollerOf(shown);
    const note = () => {
      follow.current = hidden(shown, scroller) < FOLLOW_PX;
      left.current = scroller.scrollTop;
    };
    target.addEventListener("scroll", note, { passive: true });
    return () => target.removeEventListener("scroll", note);
  }, [done]);
  useEffect(() => {
    if (!end.current || !follow.current) return;
    const { scroller } = scrollerOf(end.current);
    // The reader may have scrolled up in this very frame, whose event is yet to come.
    if (scroller.scrollTop < left.current - FOLLOW_PX) follow.current = false;
    if (!follow.current) return;
    const below = hidden(end.current, scroller);
    if (below > 0) scroller.scrollTop += below + FOLLOW_PX / 4;
    left.current = scroller.scrollTop;
  }, [text, done]);
  return end;
}

const FOLLOW_PX = 80;

/** How many pixels of an element are below the visible area. */
const hidden = (element, scroller) =>
  element.getBoundingClientRect().bottom +
  (parseFloat(getComputedStyle(scroller).scrollPaddingBottom) || 0) -
  (scroller === document.scrollingElement ? innerHeight : scroller.getBoundingClientRect().bottom);

/** The answers' pane scrolls on a wide screen, the whole page on a phone. */
const scrollerOf = (element) => {
  const pane = element.closest(".answers");
  return getComputedStyle(pane).overflowY === "auto"
    ? { scroller: pane, target: pane }
    : { scroller: document.scrollingElement, target: document };
};

/** What went wrong with an answer, if anything did. */
export function Failures({ live }) {
  const status = live.status.value;
  const so = live.text.value ? "; this is the output so far." : " before there was any output.";
  return html`
    ${live.error.value && html`<${Notice} kind="error"><${Text} text=${live.error.value} /></${Notice}>`}
    ${!ended(status) && live.lost.value &&
    html`<${Notice}>Connection lost; reconnecting. The prediction goes on.</${Notice}>`}
    ${["canceled", "aborted"].includes(status) && html`<${Notice}>Canceled${so}</${Notice}>`}
  `;
}

function Output({ live, text, json, looksJson, raw, status, done, narrow }) {
  const end = useFollowing(text, done);
  return html`
    <${Failures} live=${live} />
    ${text || !done
      ? html`<div class=${`output${looksJson ? " is-json" : ""}`} dir="auto" data-testid="output"
          ref=${end}>${json && !raw
          ? html`<${Formatted} text=${text} line=${narrow ? 42 : undefined} />`
          : html`<${Text} text=${text} />`}${!done && html`<span class="caret" aria-hidden="true"></span>`}</div>`
      : status === "succeeded" && html`<p class="nothing">The answer is empty.</p>`}
  `;
}

function Figures({ live }) {
  const [, setNow] = useState(0);
  const running = live.running && live.meter;
  useEffect(() => {
    if (!running) return undefined;
    const timer = setInterval(() => setNow((before) => before + 1), 100);
    return () => clearInterval(timer);
  }, [running]);
  live.beat.value; // re-render for new tokens
  const { first, rate, tokens, time } = figures(live);
  return html`
    <dl class="figures">
      <div><dt>First token</dt><dd>${duration(first)}</dd></div>
      <div><dt>Tokens per second</dt><dd>${speed(rate)}</dd></div>
      <div><dt>Tokens</dt><dd>${tokens === null ? "–" : count(tokens)}</dd></div>
      <div><dt>${live.running ? "Elapsed" : "Time"}</dt><dd>${duration(time)}</dd></div>
    </dl>
    ${live.meter && html`<${Arrivals} live=${live} />`}
  `;
}

const UNITS = { predict_time: duration, total_time: duration, time_to_first_token: duration };

function Metrics({ prediction }) {
  const metrics = Object.entries(prediction?.metrics ?? {});
  if (!metrics.length) return html`<p class="nothing">No metrics yet.</p>`;
  return html`<table class="metrics"><tbody>
    ${metrics.map(([name, value]) => {
      const plain = typeof value === "number";
      const shown = plain ? (UNITS[name]?.(value) ?? count(Math.round(value * 100) / 100)) : null;
      const text = typeof value === "string" ? value : JSON.stringify(value);
      return html`<tr key=${name}>
        <th scope="row">${name}</th>
        <td>${plain ? shown : html`<pre><${Formatted} text=${text} /></pre>`}</td>
      </tr>`;
    })}
  </tbody></table>`;
}

