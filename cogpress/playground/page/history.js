// The list of past predictions: its filters in URLs of the page and of the server, and its pages.

import { get, local } from "./api.js";

export const FILTERS = ["q", "status", "model", "version", "rating"];

/** The filters in a URL's query. */
export const filtersOf = (search) => {
  const given = new URLSearchParams(search);
  return Object.fromEntries(FILTERS.map((name) => [name, given.get(name) ?? ""]));
};

const query = (filters, more = {}) => {
  const set = new URLSearchParams(more);
  for (const name of FILTERS) if (filters[name]) set.set(name, filters[name]);
  return set.toString();
};

/** The page's URL with these filters. */
export const address = (filters, more = {}) => `/?${query(filters, { view: "history", ...more })}`;

/** The first page of results, or a later one with `next` from the page before. */
export const page = (filters, { next = null, signal } = {}) =>
  get(next ? local(next) : `/playground/api/history?${query(filters)}`, { signal });
