"""The dashboard and the alert rules against what is really exported: metric names, labels, label values, syntax."""

import json
import re
from pathlib import Path

import pytest
import yaml

from coordinator.metrics import Metrics
from protos.tensor_parallel.v1 import shard_pb2
from shardd.metrics import Metrics as ShardMetrics

promql_parser = pytest.importorskip("promql_parser", reason="promql-parser is not installed (the test extra has it)")

MONITORING = Path(__file__).resolve().parents[2] / "deploy" / "monitoring"
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
RULES = [
    rule for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
SCRAPE_LABELS = {"job", "instance"}  # added by Prometheus
VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$model": ".*", "$job": ".*"}


def exported():
    """Name -> label names, and name -> labels' values, of every sample both daemons export once they have worked."""
    coordinator, shard = Metrics(version="1"), ShardMetrics(0)
    coordinator.set_model("mlp", True)
    coordinator.request_finished("mlp", "OK", 0.1)
    coordinator.dispatched("mlp", 1, [0.1])
    coordinator.answered("mlp", 0.1)
    coordinator.set_ranks([True])
    coordinator.generation_ended("rank_lost")
    coordinator.generation_started(1, 0.5)
    coordinator.load_finished("OK", 1.0)
    shard.forward(shard.model("mlp"), 0.002, 0.001, 0.0)
    shard.command("ok")
    shard.loaded(1)
    status = shard_pb2.StatusResponse(state="READY", models=[shard_pb2.LoadedModel(name="mlp")])
    shard.watch(lambda: status)
    labels, values = {}, {}
    for registry in (coordinator.registry, shard.registry):
        for family in registry.collect():
            for sample in family.samples:
                if not sample.name.endswith("_created"):
                    labels[sample.name] = set(sample.labels)
                    for label, value in sample.labels.items():
                        values.setdefault((sample.name, label), set()).add(value)
    return labels, values


LABELS, VALUES = exported()


def queries():
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield pytest.param(target["expr"], target["legendFormat"], id=f"{panel['title']}-{target['refId']}")
    for annotation in DASHBOARD["annotations"]["list"]:
        yield pytest.param(annotation["expr"], "", id=annotation["name"])
    for rule in RULES:
        yield pytest.param(rule["expr"], "", id=rule["alert"])


def parsed(expression):
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return promql_parser.parse(expression)


def selectors(node):
    """Every vector selector below ``node``, and the labels grouped by around it."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    elif isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector
    elif isinstance(node, promql_parser.BinaryExpr):
        yield from selectors(node.lhs)
        yield from selectors(node.rhs)
    elif isinstance(node, promql_parser.Call):
        for argument in node.args:
            yield from selectors(argument)
    elif isinstance(node, promql_parser.AggregateExpr | promql_parser.ParenExpr | promql_parser.UnaryExpr):
        yield from selectors(node.expr)


def groupings(node):
    if isinstance(node, promql_parser.AggregateExpr):
        if node.modifier is not None:
            yield set(node.modifier.labels), [s.name for s in selectors(node.expr)]
        yield from groupings(node.expr)
    elif isinstance(node, promql_parser.BinaryExpr):
        yield from groupings(node.lhs)
        yield from groupings(node.rhs)
    elif isinstance(node, promql_parser.Call):
        for argument in node.args:
            yield from groupings(argument)
    elif isinstance(node, promql_parser.ParenExpr | promql_parser.UnaryExpr):
        yield from groupings(node.expr)


@pytest.mark.parametrize(("expression", "legend"), list(queries()))
def test_queries_use_what_is_exported(expression, legend):
    tree = parsed(expression)
    used = list(selectors(tree))
    assert used, "a query without a metric"
    for selector in used:
        assert selector.name in LABELS, f"{selector.name} is not exported"
        for matcher in selector.matchers.matchers:
            assert matcher.name in LABELS[selector.name] | SCRAPE_LABELS, f"{selector.name} has no {matcher.name}"
            if matcher.name == "le":
                assert matcher.value in VALUES[selector.name, "le"], f"no bucket {matcher.value}"
    for labels, names in groupings(tree):
        for name in names:
            assert labels <= LABELS[name] | SCRAPE_LABELS, f"{name} lacks {labels - LABELS[name]}"
    shown = set(re.findall(r"{{(\w+)}}", legend))
    for labels, _names in groupings(tree):
        assert shown <= labels, f"the legend shows {shown}, the query keeps {labels}"


def test_codes_and_reasons_in_queries_are_real():
    import grpc

    known = {code.name for code in grpc.StatusCode}
    text = json.dumps(DASHBOARD) + json.dumps(RULES)
    codes = {code for group in re.findall(r'code=~?\\+"([A-Z_|]+)\\+"', text) for code in group.split("|")}
    assert codes
    assert codes <= known


def test_every_metric_of_ours_is_on_the_dashboard():
    shown = {selector.name for param in queries() for selector in selectors(parsed(param.values[0]))}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in LABELS if not name.startswith("process_")}
    assert families - {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} == set()


def test_variables_ask_for_what_is_exported():
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()
            assert label in LABELS[metric] | SCRAPE_LABELS


def test_panels_do_not_overlap():
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_say_what_to_do(rule):
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"]
    assert len(rule["annotations"]["description"]) > 20
    comparison = parsed(rule["expr"])
    assert rule["expr"].startswith("absent(") or isinstance(comparison, promql_parser.BinaryExpr)
    kept = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    for labels, _names in groupings(comparison):
        assert kept <= labels or not labels & {"rank", "model"}
