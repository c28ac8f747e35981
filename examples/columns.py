"""The columns that the worked example's questions are about: names, kinds and values, other ones in each split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from examples.queries import NUMERIC, PRESENCE


@dataclass(frozen=True, slots=True)
class Column:
    """A column that questions can be about.

    `kind` says what may be asked of it: `number` is measured, `code` is a label made of digits, `text` a label, `flag`
    true or false, `prose` free text, `id` names one thing. `values` are filter values as a question writes them.
    """

    name: str
    kind: str
    values: tuple[str, ...]


_TRAIN_COLUMNS = (  # kind, values, names
    ("number", "50 100 200 250 500", "duration_ms db.duration_ms tls.handshake_ms"),
    ("number", "100 400 600 1000 2000", "queue.wait_ms render_ms gc.pause_ms http.latency job.runtime span.self_ms"),
    ("number", "1 2 5 10 20", "retry_count retries db.rows db.connections error_count http.redirects span.links"),
    ("number", "5 10 16 25 60", "queue.depth pool.active thread.count worker.count batch.size cache.misses"),
    ("number", "0.1 0.25 0.5 0.9", "cpu.load cpu.usage cache.ratio sample_rate disk.usage load_avg"),
    ("number", "64 128 256 512 1024", "memory_mb disk.free http.request.size http.body_size response.bytes"),
    ("number", "80 450 800 4096", "net.bytes_in net.bytes_out message.size file.size"),
    ("code", "200 201 301 404 429 500 503", "http.status_code status_code http.status response.code"),
    ("code", "0 1 13 14 137", "exit_code process.exit"),
    ("code", "80 443 5432 8080", "server.port net.port client.port"),
    ("text", "search users frontend auth orders", "service.name service app.name peer.service team.name"),
    ("text", "GET POST HEAD TRACE PATCH", "http.method http.request.method method"),
    ("text", "prod test dev canary", "env deployment.env service.env cloud.account"),
    ("text", "us-east us-west eu-west eu-north", "cloud.region region dc.name cloud.zone"),
    ("text", "web-1 web-2 api-1 api-7 db-3", "host.name host node.name server.name k8s.node k8s.pod container.name"),
    ("text", "default system jobs ingress", "k8s.namespace k8s.cluster service.namespace"),
    ("text", "postgres oracle redis sqlite", "db.system db.type db.driver"),
    ("text", "users items invoices events", "db.table db.name db.collection queue.name"),
    ("text", "SELECT COPY MERGE", "db.operation sql.verb"),
    ("text", "timeout closed reset lost", "error.type error.kind exception.type status.reason"),
    ("text", "v1 v2 v3 v4", "service.version app.version release api.version"),
    ("text", "info warn error debug", "log.level"),
    ("text", "free pro team business", "user.plan account.tier customer.plan"),
    ("text", "US DE FR IT", "user.country client.country geo.country"),
    ("text", "mac android web windows", "os.name client.os platform device.os"),
    ("text", "Brave Edge Opera", "browser.name browser client.name"),
    ("text", "List Get Create Delete", "span.name operation"),
    ("text", "server client external internal", "span.kind"),
    ("text", "hit miss stale", "cache.result cache.state"),
    ("text", "edge core mesh", "envoy.cluster istio.route consul.peer"),
    ("text", "shard-1 shard-2 shard-6", "mongo.shard redis.keyspace elastic.index"),
    ("number", "70 110 700 950", "envoy.retries mongo.docs redis.keys"),
    ("text", "gzip br zstd", "http.encoding net.encoding"),
    ("prose", "/api /v1 /admin /health /login", "http.route http.url url.path http.target request.path"),
    ("prose", "failed denied timeout invalid", "error.message exception.message log.message log.body message"),
    ("prose", "SELECT JOIN users", "db.statement sql.query"),
    ("prose", "Mozilla curl bot", "user_agent http.user_agent"),
    ("flag", "true false", "error cache.hit is_root user.beta tls.enabled job.success http.retried feature.enabled"),
    ("id", "", "user.id session.id request.id customer.id account.id tenant.id device.id job.id client.ip"),
    ("id", "", "trace.id span.id trace.parent_id"),
)

_TEST_COLUMNS = (
    ("number", "15 40 75 300 750 1500", "lambda.billed_ms video.stall_ms agent.idle ci.elapsed"),
    ("number", "3 4 6 8 12 30", "kafka.lag kafka.age cart.items game.score vm.cores order.weight"),
    ("number", "0.2 0.7 0.95 1.5", "agent.util wifi.signal tax.rate sensor.drift robot.battery"),
    ("number", "35 90 350 900", "cart.total payment.amount sensor.temp s3.size video.bitrate robot.fan"),
    ("code", "7 9 11 33", "kafka.partition wifi.channel robot.axis video.track"),
    ("text", "paypal maestro direct", "payment.provider payment.gateway"),
    ("text", "gold blue black", "payment.card"),
    ("text", "USD CAD AUD", "cart.currency tax.currency"),
    ("text", "signups plays", "kafka.topic kafka.group s3.bucket"),
    ("text", "A100 H100 L4", "vm.model vm.class vm.flavor"),
    ("text", "h264 vp9 av1", "video.codec"),
    ("text", "resize notify export", "lambda.name lambda.handler"),
    ("text", "main hotfix release", "ci.branch ci.pipeline"),
    ("text", "dhl ups fedex", "order.carrier"),
    ("text", "normal low high", "mail.priority mail.queue"),
    ("text", "castle forest river", "game.map game.mode"),
    ("text", "north south east", "store.zone store.dock"),
    ("prose", "broken product author", "mail.subject email.subject chat.text"),
    ("prose", "media backup logs", "s3.prefix lambda.arn"),
    ("prose", "viewer product author", "graphql.field graphql.document"),
    ("flag", "true false", "lambda.cold payment.declined email.bounced ci.passed order.delayed cart.expired"),
    ("id", "", "player.uid cart.uid payment.ref sensor.serial email.recipient order.label"),
)


def _columns(table: Iterable[tuple[str, str, str]]) -> tuple[Column, ...]:
    return tuple(Column(name, kind, tuple(values.split())) for kind, values, names in table for name in names.split())


COLUMNS = {"train": _columns(_TRAIN_COLUMNS), "test": _columns(_TEST_COLUMNS)}
"""Every column of a split; the splits share no name, and each test name has a word that no training name has."""

FITTING: dict[str, tuple[str, ...]] = {
    "breakdown": ("text", "code", "flag", "id"),
    "COUNT_DISTINCT": ("text", "id", "prose"),
    **dict.fromkeys(NUMERIC, ("number",)),
    "=": ("text", "code", "flag"),
    "!=": ("text", "code"),  # "is not true" could as well mean false
    ">": ("number", "code"),
    **dict.fromkeys(PRESENCE, ("number", "code", "text", "prose", "id")),  # "is set" could as well mean true
}
"""The kinds of column that a part of a query makes sense for."""
