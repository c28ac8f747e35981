// Requests to the server, with its token if it needs one. The token is kept until the tab is closed and sent only as a
// header; it never appears in a URL or in generated code.

import { signal } from "./vendor/signals.js";

const KEY = "cogpress.token";

/** Set when a request was refused because the token is missing or wrong. */
export const tokenWanted = signal(null);

/** A failed request; the message is for people. */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const token = () => sessionStorage.getItem(KEY);

/** Ask for a token, but if there is one, only once the server refuses it. */
export function needToken() {
  if (!token()) tokenWanted.value = "";
  else send("/v1/account").catch(() => {}); // a refusal asks for it
}

export function giveToken(text) {
  sessionStorage.setItem(KEY, text.trim());
  tokenWanted.value = null;
}

/** Send a request; returns a 2xx Response, or throws an ApiError. */
export async function send(path, { method = "GET", body, signal: abort, headers = {} } = {}) {
  const all = { Accept: "application/json", ...headers };
  if (token()) all.Authorization = `Bearer ${token()}`;
  const form = body instanceof FormData;
  if (body !== undefined && !form) all["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers: all, signal: abort, body: form ? body : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) tokenWanted.value = token() ? "The server did not accept this token." : "";
  throw await problemOf(response);
}

async function problemOf(response) {
  let said = {};
  try {
    said = await response.json();
  } catch {
    // Not from this server, so only the status is known.
  }
  const detail = typeof said.detail === "string" ? said.detail : said.title;
  return new ApiError(detail || `The server answered ${response.status}.`, response.status);
}

export const get = async (path, options) => (await send(path, options)).json();
export const post = async (path, body) => (await send(path, { method: "POST", body })).json();
export const put = async (path, body) => (await send(path, { method: "PUT", body })).json();

/** The path of a URL from the server, which may know itself by another name than this page does. */
export const local = (url) => {
  const { pathname, search } = new URL(url, location.origin);
  return pathname + search;
};

const part = encodeURIComponent;

export const versionPath = ({ owner, name, version }) =>
  `/v1/models/${part(owner)}/${part(name)}/versions/${part(version)}`;
export const predictionPath = (id) => `/v1/predictions/${part(id)}`;
export const ratingPath = (id) => `/playground/api/predictions/${part(id)}/rating`;

/** Upload a file; returns its URL. */
export async function upload(file) {
  const body = new FormData();
  body.append("content", file, file.name);
  return (await (await send("/v1/files", { method: "POST", body })).json()).urls.get;
}
