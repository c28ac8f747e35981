// The chat view: a conversation with the model, its system text and settings beside it.

import { useEffect, useRef } from "../vendor/hooks.js";
import { html } from "../html.js";
import {
  answering, begin, converses, draft, edit, regenerate, say, settings, stop, system, turns, unanswered, wrong,
} from "../chat.js";
import { ended } from "../stream.js";
import { choose, schema, schemaProblem, showProblems, targets } from "../workbench.js";
import { Failures, useAnnounced, useFollowing } from "./answer.js";
import { Copy, Notice, Text } from "./parts.js";
import { Folded, Targets } from "./run.js";

export function Chat() {
  const composer = useRef(null);
  useEffect(() => {
    if (targets.value.length > 1) choose([targets.value[0]]);
    const onKeyDown = (event) => event.key === "Escape" && answering.value && stop();
    addEventListener("keydown", onKeyDown);
    return () => removeEventListener("keydown", onKeyDown);
  }, []);
  const focus = () => composer.current?.focus();
  const anew = () => {
    begin();
    focus();
  };
  return html`
    <div class="bench">
      <form class="form" aria-label="Model and settings" onSubmit=${(event) => event.preventDefault()}>
        <${Targets} single />
        ${schemaProblem.value && html`<${Notice} kind="error">${schemaProblem.value}</${Notice}>`}
        ${converses.value && html`
          <div class="field">
            <div class="field-head"><label for="system">System text</label></div>
            <textarea id="system" class="grows" rows="2" dir="auto" aria-describedby="system-help"
              value=${system.value} onInput=${(event) => (system.value = event.currentTarget.value)}></textarea>
            <p class="help" id="system-help">Instructions for the whole conversation. Empty: the model’s own.</p>
          </div>
          ${settings.value.length > 0 && html`<${Folded} title="Settings" fields=${settings.value} compact />`}`}
        <div class="form-foot">
          <button type="button" class="button" onClick=${anew} disabled=${!turns.value.length}>New chat</button>
        </div>
      </form>
      <section class="talk" id="answer" aria-label="Conversation" tabindex="-1">
        <div class="answers">
          ${schema.value && !converses.value
            ? html`<p class="talk-empty">This model takes no conversation. Ask it with the form under Run.</p>`
            : html`<${Turns} focus=${focus} />`}
        </div>
        <${Composer} field=${composer} />
      </section>
    </div>
  `;
}

function Turns({ focus }) {
  const shown = turns.value;
  if (!shown.length)
    return html`<div class="talk-empty">
      <p class="empty-line">The conversation will appear here.</p>
      <p>Enter sends, Shift Enter begins a new line. Every answer has a link that you can share.</p>
    </div>`;
  return html`<ol class="turns">
    ${shown.map(({ asked, live }, index) => html`
      <li class="turn asked" key=${`asked-${index}`}>
        <h2 class="turn-who">You</h2>
        <div class="turn-text" dir="auto"><${Text} text=${asked} /></div>
        ${!answering.value && html`<div class="turn-foot">
          <button type="button" class="button quiet" onClick=${() => (edit(index), focus())}>Edit</button>
        </div>`}
      </li>
      <${Reply} live=${live} last=${index === shown.length - 1} key=${`reply-${index}`} />`)}
  </ol>`;
}

function Reply({ live, last }) {
  const status = live.status.value;
  const text = live.text.value;
  const done = ended(status);
  const end = useFollowing(text, done);
  useAnnounced(live, done);
  // A new turn comes into view even after the reader scrolled away.
  useEffect(() => last && end.current?.scrollIntoView({ block: "nearest" }), []);
  const id = live.prediction.value?.id;
  return html`<li class="turn reply" ref=${end} data-status=${status} aria-busy=${String(!done)}>
    <h2 class="turn-who">${live.label || "Model"}</h2>
    <${Failures} live=${live} />
    ${status === "succeeded" && !text && html`<p class="nothing">The answer is empty.</p>`}
    <div class="turn-text" dir="auto"><${Text} text=${text} />${!done &&
      html`<span class="caret" aria-hidden="true"></span>`}</div>
    ${done && html`<div class="turn-foot">
      ${last && html`<button type="button" class="button quiet" onClick=${regenerate} disabled=${Boolean(wrong.value)}>
        ${text ? "Regenerate" : "Try again"}</button>`}
      ${text && html`<${Copy} quiet text=${text} />`}
      ${id && html`<a class="button quiet" href=${`/p/${id}`}>Details</a>`}
    </div>`}
  </li>`;
}

function Composer({ field }) {
  const submit = (event) => {
    event?.preventDefault();
    if (wrong.value) showProblems.value = true;
    say();
  };
  const onKeyDown = (event) => {
    // While an input method composes a character, Enter chooses it.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  };
  const hint = wrong.value
    ? `${wrong.value.field.title} ${wrong.value.problem}.`
    : unanswered.value && "There is no answer to go on from. Try again, or edit your text.";
  return html`<form class="composer" onSubmit=${submit} aria-label="Your text">
    ${hint && html`<p class="problem" id="composer-hint">${hint}</p>`}
    <div class="composer-row">
      <textarea id="composer" class="grows" rows="1" dir="auto" aria-label="Your text" ref=${field}
        aria-describedby=${hint ? "composer-hint" : undefined} placeholder="Say something"
        value=${draft.value} onInput=${(event) => (draft.value = event.currentTarget.value)}
        onKeyDown=${onKeyDown}></textarea>
      ${answering.value
        ? html`<button type="button" class="button stop" onClick=${stop}>Stop <kbd>Esc</kbd></button>`
        : html`<button type="submit" class="button primary"
            disabled=${!draft.value.trim() || unanswered.value || !converses.value}>Send</button>`}
    </div>
  </form>`;
}
