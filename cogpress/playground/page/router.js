// Client-side routing: the current URL, and navigation without reloads.

import { signal } from "./vendor/signals.js";

export const here = signal(new URL(location.href));

/** Navigate to a path of this page; `replace` replaces the current entry of the browser's history. */
export function go(path, { replace = false } = {}) {
  const url = new URL(path, location.origin);
  if (url.href === location.href) return;
  history[replace ? "replaceState" : "pushState"](null, "", url);
  here.value = url;
  if (!replace) scrollTo(0, 0);
}

/** A URL cut off in an email may end in an incomplete escape. */
function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** The view that a URL names, with its parameters. */
export function viewOf(url) {
  const params = url.searchParams;
  const permalink = /^\/p\/([^/]+)\/?$/.exec(url.pathname);
  if (permalink) return { view: "run", id: decoded(permalink[1]) };
  if (url.pathname === "/compare") return { view: "compare", a: params.get("a"), b: params.get("b") };
  if (params.get("view") === "chat") return { view: "chat" };
  if (params.get("view") === "history") return { view: "history", with: params.get("with") };
  return { view: "run", id: null };
}

addEventListener("popstate", () => {
  here.value = new URL(location.href);
});

// Plain clicks on this page's links are handled here; modified clicks and other links by the browser.
addEventListener("click", (event) => {
  const link = event.target.closest?.("a[href]");
  if (!link || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.defaultPrevented) return;
  const url = new URL(link.href);
  if (link.target || link.hasAttribute("download") || url.origin !== location.origin || url.hash) return;
  if (url.pathname !== "/" && !url.pathname.startsWith("/p/") && url.pathname !== "/compare") return;
  event.preventDefault();
  go(url.href);
});
