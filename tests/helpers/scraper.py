"""/metrics of a server, as Prometheus's own parser has it."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

COUNTERS = "_total", "_bucket", "_count", "_sum"


def scrape(server):
    """(name, labels) -> value, as Prometheus's parser has it; of any rank."""
    answer = httpx.get(f"{server.url}/metrics", headers=server.headers, timeout=10)
    families = text_string_to_metric_families(answer.text)
    return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}


def total(found, name, **labels):
    """The sum of what has these labels."""
    wanted = {(label, str(value)) for label, value in labels.items()}
    return sum(value for (other, all_labels), value in found.items() if other == name and wanted <= all_labels)


def falls(before, after):
    """Counters that became less."""
    return [name for name, value in before.items() if name[0].endswith(COUNTERS) and after[name] < value]
