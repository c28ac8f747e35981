// Templates for all elements of the page. Text always becomes text nodes; nothing sets innerHTML.

import { h } from "./vendor/preact.js";
import htm from "./vendor/htm.js";

export const html = htm.bind(h);
