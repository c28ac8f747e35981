// The list of past predictions: its filters as a URL of this page and of the server, and its pages.

import { get, local } from "./api.js";

export const FILTERS = ["q", "status", "model", "version", "rating"];

/** The filters that a page address holds. */
export const filtersOf = (search) => {
  const given = new URLSearchParams(search);
  return Object.fromEntries(FILTERS.map((name) => [name, given.get(name) ?? ""]));
};

const query = (filters, more = {}) => {
  const set = new URLSearchParams(more);
  for (const name of FILTERS) if (filters[name]) set.set(name, filters[name]);
  return set.toString();
};

/** This page's address with these filters. */
export const address = (filters, more = {}) => `/?${query(filters, { view: "history", ...more })}`;

/** The first page, or with `next` (from a page before) a further one. */
export const page = (filters, { next = null, signal } = {}) =>
  get(next ? local(next) : `/playground/api/history?${query(filters)}`, { signal });
