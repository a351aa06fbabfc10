"""The dashboard shows metrics that exist."""

import json
import re
from pathlib import Path

from nanovllm.frontend.server.metrics import ServerMetrics
from tests.frontend.fake_core import STATUS, WELCOME

DASHBOARD = Path(__file__).parents[3] / "docs" / "grafana.json"


def test_every_metric_of_the_dashboard_is_exposed() -> None:
    exposition = ServerMetrics(lambda: (WELCOME, [STATUS])).exposition().decode()
    exposed = set(re.findall(r"^# TYPE (nanovllm:\w+)", exposition, re.MULTILINE))
    panels = json.loads(DASHBOARD.read_text())["panels"]
    shown = {
        name.removesuffix("_bucket")
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"nanovllm:\w+", target["expr"])
    }
    assert len(panels) == 12 and shown <= exposed, shown - exposed
