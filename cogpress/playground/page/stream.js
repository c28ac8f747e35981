// A live prediction: its text, logs, state and chunk arrival times, as signals.

import { batch, signal } from "./vendor/signals.js";
import { ApiError, get, local, post, predictionPath } from "./api.js";
import { asText } from "./text.js";

const POLL_MS = 500;

export const ended = (status) => ["succeeded", "failed", "canceled", "aborted"].includes(status);

/** Arrival times in seconds since the start, and what follows from them. */
export class Meter {
  constructor(clock = () => performance.now()) {
    this.clock = clock;
    this.start = clock();
    this.arrivals = [];
  }

  note() {
    this.arrivals.push((this.clock() - this.start) / 1000);
  }

  get elapsed() {
    return (this.clock() - this.start) / 1000;
  }

  get first() {
    return this.arrivals[0] ?? null;
  }

  /** Chunks per second since the first, counted like the model's own figure; null until there are three. */
  get rate() {
    const { arrivals } = this;
    const span = arrivals.at(-1) - arrivals[0];
    return arrivals.length > 2 && span > 0 ? (arrivals.length - 1) / span : null;
  }
}

export class Live {
  constructor(label = "") {
    this.label = label;
    this.prediction = signal(null);
    this.status = signal("starting");
    this.text = signal("");
    this.logs = signal("");
    this.error = signal(null);
    this.lost = signal(false); // whether the connection is lost; the browser keeps retrying
    this.beat = signal(0); // incremented with each frame that brought something, to redraw the arrivals
    this.meter = null; // null for a prediction that was started elsewhere
    this.duration = signal(null);
    this._pending = [];
    this._source = null;
    this._closed = false;
  }

  get running() {
    return !ended(this.status.value);
  }

  /** Start a prediction and follow it. Resolves once it is created; rejects with an ApiError if it is refused. */
  async create(path, body) {
    this.meter = new Meter();
    try {
      this._take(await post(path, body));
    } catch (error) {
      batch(() => {
        this.status.value = "failed";
        this.error.value = error.message;
      });
      throw error;
    }
    this._follow();
    return this.prediction.value;
  }

  /** Show an existing prediction, and follow it if it still runs. */
  show(prediction) {
    this._take(prediction);
    this.text.value = asText(prediction.output);
    if (!ended(prediction.status)) {
      this.text.value = "";
      this.logs.value = "";
      this._follow(); // the stream replays everything
    }
    return this;
  }

  async cancel() {
    const { prediction } = this;
    if (prediction.value && this.running) await post(`${predictionPath(prediction.value.id)}/cancel`);
  }

  /** Stop following; the prediction goes on. */
  close() {
    this._closed = true;
    this._source?.close();
  }

  _take(prediction) {
    batch(() => {
      this.prediction.value = prediction;
      this.status.value = prediction.status;
      this.error.value = prediction.error ? String(prediction.error) : null;
      if (prediction.logs) this.logs.value = prediction.logs;
    });
  }

  _follow() {
    const { urls } = this.prediction.value;
    if (!urls?.stream) return void this._poll();
    const source = new EventSource(local(urls.stream));
    this._source = source;
    source.addEventListener("open", () => (this.lost.value = false));
    source.addEventListener("output", (event) => {
      this.meter?.note();
      this._later("text", event.data);
    });
    source.addEventListener("logs", (event) => this._later("logs", event.data));
    source.addEventListener("error", (event) => {
      // Two events share this name: the server's, which has data, and a lost connection, which has none. The browser
      // reconnects by itself and resumes; only a refusal is final.
      if (event.data !== undefined) return;
      if (source.readyState === EventSource.CLOSED) this._poll();
      else this.lost.value = true;
    });
    source.addEventListener("done", () => {
      source.close();
      this._conclude();
    });
  }

  /** Batch chunks by animation frame: a thousand tokens a second must not cause a thousand renders. */
  _later(kind, data) {
    this._pending.push([kind, data]);
    if (this._pending.length === 1) {
      // A hidden tab gets no animation frames, so a timer is the fallback.
      const timer = setTimeout(() => this._flush(), 200);
      requestAnimationFrame(() => (clearTimeout(timer), this._flush()));
    }
  }

  _flush() {
    const pending = this._pending.splice(0);
    if (!pending.length) return;
    batch(() => {
      for (const kind of ["text", "logs"]) {
        const added = pending.filter(([of]) => of === kind).map(([, data]) => data);
        const whole = kind === "logs" ? added.map((line) => line.replace(/\n?$/, "\n")) : added;
        if (added.length) this[kind].value += whole.join("");
      }
      if (this.status.value === "starting") this.status.value = "processing";
      this.beat.value += 1;
    });
  }

  /** After the stream's end, take the final state from the server. */
  async _conclude() {
    if (this.meter) this.duration.value = this.meter.elapsed;
    this._flush();
    for (let tries = 0; !this._closed; tries++) {
      try {
        const prediction = await get(predictionPath(this.prediction.value.id));
        if (ended(prediction.status)) return this._finish(prediction);
      } catch (error) {
        if (!(error instanceof ApiError) || tries > 20) return this._fail(error);
      }
      await new Promise((resolve) => setTimeout(resolve, Math.min(50 * (tries + 1), POLL_MS)));
    }
  }

  async _poll() {
    let failures = 0;
    while (!this._closed) {
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
      try {
        const prediction = await get(predictionPath(this.prediction.value.id));
        failures = 0;
        if (ended(prediction.status)) {
          if (this.meter) this.duration.value = this.meter.elapsed;
          return this._finish(prediction);
        }
        this._take(prediction);
        this.text.value = asText(prediction.output);
      } catch (error) {
        if (++failures > 5) return this._fail(error);
      }
    }
  }

  _finish(prediction) {
    batch(() => {
      this._take(prediction);
      // If the server does not store outputs, keep what was streamed.
      if (prediction.output !== null && prediction.output !== undefined) this.text.value = asText(prediction.output);
      this.beat.value += 1;
    });
  }

  _fail(error) {
    batch(() => {
      this.status.value = "failed";
      this.error.value = error.message;
    });
  }
}

/** A prediction's figures: the model's own, or else as measured here. */
export function figures(live) {
  const metrics = live.prediction.value?.metrics ?? {};
  const { meter } = live;
  return {
    first: metrics.time_to_first_token ?? meter?.first ?? null,
    rate: metrics.tokens_per_second ?? meter?.rate ?? null,
    tokens: metrics.output_token_count ?? meter?.arrivals.length ?? null,
    time: live.running ? (meter?.elapsed ?? null) : (metrics.predict_time ?? live.duration.value),
  };
}
