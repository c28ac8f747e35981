// Entry point: render the page.

import { render } from "./vendor/preact.js";
import { html } from "./html.js";
import { App } from "./views/app.js";

render(html`<${App} />`, document.getElementById("page"));
