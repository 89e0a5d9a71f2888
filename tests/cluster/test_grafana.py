"""The dashboard's file: what Grafana needs, and names that the project exports."""

from __future__ import annotations

import itertools

import yaml

from pipelines.common import metrics
from tests.helpers.dashboard import dashboard, queries
from tests.helpers.data import PROJECT

COLUMNS = 24
"""Width of Grafana's grid."""
ROWS = 25
"""Height of what can be seen at once on a screen with 1080 lines."""
FOLDER = PROJECT / "cluster" / "grafana"


def test_panels_have_their_own_ids_and_places_on_one_screen() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 12
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        rows = range(place["y"], place["y"] + place["h"])
        assert columns.stop <= COLUMNS, panel["title"]
        assert rows.stop <= ROWS, panel["title"]
        taken = set(itertools.product(columns, rows))
        assert taken
        assert not taken & cells, panel["title"]
        cells |= taken


def test_the_data_source_is_a_variable() -> None:
    variables = {one["name"]: one for one in dashboard()["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    asking = [
        *dashboard()["panels"],
        *(target for panel in dashboard()["panels"] for target in panel["targets"]),
        variables["run"],
    ]
    for one in asking:
        assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_targets_of_a_panel_have_their_own_names() -> None:
    for panel in dashboard()["panels"]:
        names = [target["refId"] for target in panel["targets"]]
        assert len(set(names)) == len(names) >= 1
        of_overrides = {
            override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]
        }
        assert of_overrides <= set(names)


def test_the_dashboard_shows_every_metric_of_the_project_and_no_other_of_that_name() -> None:
    ours = {f"{metrics.PREFIX}{metric.name}" for metric in metrics.EXPORTED}
    shown = set().union(*(query.names for query in queries()))
    assert {name for name in shown if "stgt" in name} == ours


def test_the_readme_names_every_metric_of_the_project() -> None:
    text = (FOLDER / "README.md").read_text()
    for metric in metrics.EXPORTED:
        assert f"`{metric.name}`" in text, metric.name


def test_prometheus_reads_the_file_in_which_ray_lists_its_nodes() -> None:
    settings = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (scrape,) = settings["scrape_configs"]
    assert scrape["file_sd_configs"] == [
        {"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}
    ]


def test_the_pod_monitor_selects_the_pods_and_the_port_that_kuberay_names() -> None:
    monitor = yaml.safe_load((FOLDER / "podmonitor.yaml").read_text())
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    assert monitor["spec"]["selector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
    assert [one["port"] for one in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]


def test_the_port_that_is_scraped_is_open_on_kubernetes() -> None:
    base = PROJECT / "cluster" / "kuberay" / "base"
    cluster = yaml.safe_load((base / "raycluster.yaml").read_text())
    (head,) = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    # KubeRay adds the port to pods that name no port of that name, as the workers do.
    (number,) = [port["containerPort"] for port in head["ports"] if port["name"] == "metrics"]
    policies = yaml.safe_load_all((base / "network-policy.yaml").read_text())
    (of_ray,) = [one for one in policies if one["metadata"]["name"] == "stgt-ray"]
    let_in = [
        rule["from"]
        for rule in of_ray["spec"]["ingress"]
        if {"port": number} in rule.get("ports", ())
    ]
    monitoring = {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}
    assert let_in == [[{"namespaceSelector": monitoring}]]
