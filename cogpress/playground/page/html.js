// The one way in which this page makes elements. Text always becomes text nodes: nothing here, and nothing that uses
// it, sets innerHTML.

import { h } from "./vendor/preact.js";
import htm from "./vendor/htm.js";

export const html = htm.bind(h);
