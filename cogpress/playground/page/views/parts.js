// Components that the views share.

import { useRef, useState } from "../vendor/hooks.js";
import { html } from "../html.js";
import { layout } from "../json.js";
import { visible } from "../text.js";
import { announcement } from "../workbench.js";

const NARROW = matchMedia("(max-width: 560px)");
const STATUS = {
  starting: "Waiting",
  processing: "Running",
  succeeded: "Done",
  failed: "Failed",
  canceled: "Canceled",
  aborted: "Aborted",
};

export const statusWord = (status) => STATUS[status] ?? status;

export const Status = ({ status }) => html`<span class="status" data-status=${status}>${statusWord(status)}</span>`;

/** Untrusted text: invisible characters are shown by name, and nothing is interpreted. */
export const Text = ({ text }) =>
  visible(text).map((piece) =>
    typeof piece === "string"
      ? piece
      : html`<span class="unseen" title="An invisible character">${piece.name}</span>`,
  );

/** Formatted and highlighted JSON; other text as it is. */
export function Formatted({ text, line = 76 }) {
  const parts = layout(text, NARROW.matches ? 42 : line);
  if (!parts) return html`<${Text} text=${text} />`;
  return parts.map(([kind, part]) =>
    kind === "space" ? part : html`<span class=${`json-${kind}`}><${Text} text=${part} /></span>`,
  );
}

/** A button that copies text, and confirms it visibly and to screen readers. */
export function Copy({ text, label = "Copy", quiet = false }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    await toClipboard(typeof text === "function" ? text() : text);
    setCopied(true);
    announcement.value = "Copied.";
    setTimeout(() => setCopied(false), 1600);
  };
  return html`<button type="button" class=${quiet ? "button quiet" : "button"} onClick=${copy}>
    ${copied ? "Copied" : label}
  </button>`;
}

async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Browsers restrict the clipboard API to secure pages; over plain HTTP the old way still works.
    const area = Object.assign(document.createElement("textarea"), { value: text, className: "offscreen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

/** Tabs with the usual keys: arrows, Home, End. `tabs` are {id, label, badge?}. */
export function Tabs({ name, label, tabs, active, onChange, children }) {
  const bar = useRef(null);
  const onKeyDown = (event) => {
    const index = tabs.findIndex((tab) => tab.id === active);
    const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const tab = tabs[(to + tabs.length) % tabs.length];
    onChange(tab.id);
    bar.current.querySelector(`[data-tab="${tab.id}"]`).focus();
  };
  return html`
    <div class="tabs" role="tablist" aria-label=${label} ref=${bar} onKeyDown=${onKeyDown}>
      ${tabs.map(
        (tab) => html`<button type="button" role="tab" key=${tab.id} id=${`${name}-${tab.id}`} data-tab=${tab.id}
          aria-selected=${String(tab.id === active)} aria-controls=${`${name}-panel`}
          tabindex=${tab.id === active ? 0 : -1} onClick=${() => onChange(tab.id)}>${tab.label}${
            tab.badge ? html`<span class="badge">${tab.badge}</span>` : null
          }</button>`,
      )}
    </div>
    <div class="panel" role="tabpanel" id=${`${name}-panel`} aria-labelledby=${`${name}-${active}`} tabindex="0">
      ${children}
    </div>
  `;
}

export const Notice = ({ kind = "info", children }) =>
  html`<div class="notice" data-kind=${kind} role=${kind === "error" ? "alert" : undefined}>${children}</div>`;
