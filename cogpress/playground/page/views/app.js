// The frame around the views: navigation, and the token form if the server needs one.

import { useEffect, useRef, useState } from "../vendor/hooks.js";
import "../vendor/signals.js"; // makes components re-render when signals that they read change
import { html } from "../html.js";
import { get, giveToken, needToken, tokenWanted } from "../api.js";
import { here, viewOf } from "../router.js";
import { announcement, choices, choose, config, lives, schema, targets } from "../workbench.js";
import { converses } from "../chat.js";
import { Chat } from "./chat.js";
import { Compare } from "./compare.js";
import { History } from "./history.js";
import { Notice } from "./parts.js";
import { Run } from "./run.js";

const VIEWS = { run: Run, chat: Chat, history: History, compare: Compare };

export function App() {
  const [problem, setProblem] = useState(null);
  const { view, ...where } = viewOf(here.value);
  const wanted = tokenWanted.value;

  useEffect(() => {
    if (wanted !== null) return;
    get("/playground/api/config").then(
      (got) => {
        config.value = got;
        setProblem(null);
        // Without a valid token the server lists no models.
        if (got.token_required && !got.models.length) needToken();
      },
      (error) => error.status !== 401 && setProblem(error.message),
    );
  }, [wanted]);

  useEffect(() => {
    const first = choices.value[0]?.options[0]?.target;
    // A permalink selects its own model.
    const free = wanted === null && (view === "chat" || (view === "run" && !where.id)) && !schema.value;
    if (first && free) choose(targets.value.length ? targets.value : [first]);
  }, [config.value, wanted, view, where.id]);

  const title = config.value?.title ?? "Playground";
  useEffect(() => {
    const named = { chat: "Chat", history: "History", compare: "Compare" }[view];
    document.title = named ? `${named} – ${title}` : title;
  }, [title, view]);

  const current = lives.value.length === 1 ? lives.value[0].prediction.value?.id : null;
  const View = VIEWS[view];
  return html`
    <a class="skip" href="#answer" onClick=${skip}>Skip to the ${view === "run" ? "answer" : "content"}</a>
    <header class="top">
      <a class="brand" href="/" aria-label=${`${title}, start`}><${Mark} /><span>${title}</span></a>
      <nav aria-label="Main">
        <a href=${current ? `/p/${current}` : "/"} aria-current=${view === "run" ? "page" : undefined}>Run</a>
        ${(converses.value || view === "chat") &&
        html`<a href="/?view=chat" aria-current=${view === "chat" ? "page" : undefined}>Chat</a>`}
        <a href="/?view=history" aria-current=${view === "history" ? "page" : undefined}>History</a>
      </nav>
    </header>
    <main id="main" tabindex="-1" data-view=${view}>
      ${problem && html`<${Notice} kind="error">${problem}</${Notice}>`}
      ${wanted !== null ? html`<${Token} said=${wanted} />` : config.value && html`<${View} ...${where} key=${view} />`}
    </main>
    <div class="offscreen" role="status" aria-live="polite">${announcement.value}</div>
  `;
}

/** Skip the header and form without changing the URL. */
function skip(event) {
  event.preventDefault();
  (document.getElementById("answer") ?? document.getElementById("main")).focus();
}

/** The logo: tokens and a pause, as the arrivals under an answer look. */
const Mark = () => html`<svg class="mark" viewBox="0 0 22 16" aria-hidden="true">
  <path d="M1.5 2v12M9 2v12M13.5 2v12M17 2v12M20.5 2v12" />
</svg>`;

function Token({ said }) {
  const field = useRef(null);
  useEffect(() => field.current.focus(), []);
  const submit = (event) => {
    event.preventDefault();
    if (field.current.value.trim()) giveToken(field.current.value);
  };
  return html`<form class="token" onSubmit=${submit}>
    <h1>This server requires a token</h1>
    ${said && html`<${Notice} kind="error">${said}</${Notice}>`}
    <label for="token">Token</label>
    <input id="token" type="password" autocomplete="off" ref=${field} />
    <p class="help">It was set when the server was started, and is kept until you close this tab.</p>
    <button type="submit" class="button primary">Continue</button>
  </form>`;
}

