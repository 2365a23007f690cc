"""Files for operators: compose file, images, Prometheus, Grafana. tests/vllm/test_compose.py runs them."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes.composefile import Service, interpolate, services

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
PROMETHEUS = DEPLOY / "prometheus"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "specedge.json"
PROFILES = ("cpu", "gpu", "engines")
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*")

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus (.ci/run does)"
)


def every_service() -> list[Service]:
    found = {each.name: each for profile in PROFILES for each in services(COMPOSE.read_text(), profile, {})}
    return list(found.values())


def run(*command: str, cwd: Path = ROOT) -> None:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_interpolation_is_compose_s() -> None:
    text = {"a": ["${X:-x}", "$${X}", "${Y:-}", 3], "b": "{${X:-{1}}"}
    assert interpolate(text, {}) == {"a": ["x", "${X}", "", 3], "b": "{{1}"}
    assert interpolate("${X:-x}:${X}", {"X": "own"}) == "own:own"
    assert interpolate("${X:-x}", {"X": ""}) == "x"
    with pytest.raises(KeyError, match="X"):
        interpolate("${X}", {})


def test_the_compose_file_is_one_by_the_specification() -> None:
    run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE))


def test_profiles_start_what_they_should() -> None:
    both = {"secrets", "edge-ngram", "prometheus", "grafana"}
    names = {profile: [each.name for each in services(COMPOSE.read_text(), profile, {})] for profile in PROFILES}
    assert set(names["cpu"]) == both | {"models", "server", "edge-draft"}
    assert set(names["gpu"]) == both | {"server-gpu", "edge-draft-gpu"}
    assert set(names["engines"]) == both | {"models", "gateway", "engine", "balancer", "edge-draft"}
    assert names["cpu"].index("secrets") < names["cpu"].index("server") < names["cpu"].index("edge-ngram")
    assert "COMPOSE_PROFILES=cpu" in (DEPLOY / ".env").read_text().splitlines()


def test_what_a_service_waits_for_can_come_true() -> None:
    """A service that must be healthy for another has a health check; one that must complete is not restarted."""
    by_name = {each.name: each for each in every_service()}
    conditions = [(each, name, wait) for each in by_name.values() for name, wait in each.waits_for.items()]
    assert {wait["condition"] for *_, wait in conditions} == {"service_completed_successfully", "service_healthy"}
    for service, name, wait in conditions:
        if wait["condition"] == "service_healthy":
            assert by_name[name].health
        else:
            assert by_name[name].entries["restart"] == "on-failure"
        of_both = [set(each.entries.get("profiles", PROFILES)) for each in (service, by_name[name])]
        assert of_both[0] <= of_both[1] or wait.get("required") is False, (
            "it is not in all of the waiting one's profiles"
        )


@pytest.mark.parametrize("service", every_service(), ids=lambda service: service.name)
def test_services_have_no_more_rights_than_they_need(service: Service) -> None:
    entries = service.entries
    user, _, _ = entries["user"].partition(":")
    assert int(user) > 0
    assert entries["read_only"] is True
    assert entries["cap_drop"] == ["ALL"]
    assert entries["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in entries
    ends = {
        name for each in every_service() for name, wait in each.waits_for.items() if "completed" in wait["condition"]
    }
    assert entries["restart"] == ("on-failure" if service.name in ends else "unless-stopped")
    assert service.health or service.name in ends
    assert "build" in entries or PINNED.fullmatch(entries["image"])
    for port in entries.get("ports", ()):
        assert port.startswith("127.0.0.1:"), "on loopback, unless the operator says otherwise"
    for volume in entries.get("volumes", ()):
        source, target, *mode = volume.split(":")
        if source.startswith("./"):
            assert (DEPLOY / source).exists()
            assert mode == ["ro"], f"{target} is of the host"


def test_volumes_are_declared_and_used() -> None:
    used = {
        volume.partition(":")[0]
        for each in every_service()
        for volume in each.entries.get("volumes", ())
        if not volume.startswith("./")
    }
    assert used == set(yaml.safe_load(COMPOSE.read_text())["volumes"])


def test_secrets_are_named_by_file_and_stay_with_those_they_are_for() -> None:
    for service in every_service():
        assert not [name for name in service.environment if re.search("TOKEN|PASSWORD|SECRET|KEY", name)]
        mounted = {volume.partition(":")[0] for volume in service.entries.get("volumes", ())}
        assert ("gateway-secrets" in mounted) == (service.name in ("secrets", "server", "server-gpu", "gateway"))
        assert ("edge-secrets" in mounted) == (service.name == "secrets" or service.name.startswith("edge-"))


def test_the_secrets_are_made_once_for_their_owners_alone(tmp_path: Path) -> None:
    (service,) = (
        each for each in services(COMPOSE.read_text(), "cpu", {"SECRETS_DIR": str(tmp_path)}) if each.name == "secrets"
    )
    run(*service.command)
    files = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*") if path.is_file()}
    secret = {"gateway/key.pem", "gateway/cert.pem", "gateway/tokens.json", "edges/edge-draft", "edges/edge-ngram"}
    assert files.keys() == secret | {"trust/ca.pem", "gateway/tokens.json.lock"}
    assert {oct(files[name].stat().st_mode & 0o777) for name in secret} == {"0o600"}
    assert oct(files["trust/ca.pem"].stat().st_mode & 0o777) == "0o644"
    tokens = json.loads(files["gateway/tokens.json"].read_text())
    assert [(each["name"], each["role"], each["max_edges"]) for each in tokens] == [
        ("edge-draft", "pool", 1),
        ("edge-ngram", "pool", 1),
    ]
    before = {name: path.read_bytes() for name, path in files.items()}
    run(*service.command)
    assert {name: path.read_bytes() for name, path in files.items()} == before
    files["edges/edge-ngram"].unlink()  # its volume was removed
    run(*service.command)
    assert files["edges/edge-draft"].read_bytes() == before["edges/edge-draft"]
    assert files["edges/edge-ngram"].read_bytes() not in (b"", before["edges/edge-ngram"])
    assert len(json.loads(files["gateway/tokens.json"].read_text())) == 2


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_pinned_small_in_rights_and_without_secrets(dockerfile: Path) -> None:
    run(str(Path(sys.executable).with_name("hadolint")), "--failure-threshold", "info", str(dockerfile))
    text = re.sub(r"\\\n", " ", dockerfile.read_text())
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert all(PINNED.fullmatch(rest) for word, rest in lines if word == "FROM")
    assert [rest for word, rest in lines if word == "USER"] == ["10001:10001"]
    assert not [word for word, _ in lines if word == "ADD"]
    assert not [rest for word, rest in lines if word in ("ARG", "ENV") and re.search("TOKEN|PASSWORD|SECRET|KEY", rest)]


def test_every_image_that_is_built_has_its_dockerfile_and_finds_its_files() -> None:
    built = {each.entries["build"]["dockerfile"] for each in every_service() if "build" in each.entries}
    assert built == {f"deploy/{path.name}" for path in DOCKERFILES}
    assert {each.entries["build"]["context"] for each in every_service() if "build" in each.entries} == {".."}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    assert {"deploy", "examples", "vllm_specedge", "edge_client", "pyproject.toml"} <= kept


def rules() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"] for rule in group["rules"]
    ]


@needs_promtool
def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    shutil.copytree(PROMETHEUS, tmp_path, dirs_exist_ok=True)
    (tmp_path / "ca.pem").touch()
    config = tmp_path / "prometheus.yml"
    config.write_text(config.read_text().replace("/run/specedge/trust", str(tmp_path)))
    run("promtool", "check", "config", "--lint=all", "--lint-fatal", str(config))
    run("promtool", "check", "rules", "--lint=all", "--lint-fatal", str(PROMETHEUS / "alerts.yml"))


def test_the_engines_name_is_the_servers_on_the_containers_network_for_prometheus() -> None:
    (job,) = (
        each
        for each in yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
        if each["job_name"] == "vllm"
    )
    ((name,),) = (each["names"] for each in job["dns_sd_configs"])
    for profile in PROFILES:
        called = [
            each.name
            for each in services(COMPOSE.read_text(), profile, {})
            if name in (each.name, *each.entries.get("networks", {}).get("default", {}).get("aliases", ()))
        ]
        assert len(called) == 1, profile
        (server,) = called
        assert "vllm" in next(each for each in every_service() if each.name == server).command


def test_an_engine_that_scales_has_no_port_of_the_host() -> None:
    """Two containers cannot have the same one, so only those that are alone have any."""
    for each in services(COMPOSE.read_text(), "engines", {}):
        assert bool(each.entries.get("ports")) == (each.name in ("gateway", "balancer", "prometheus", "grafana"))


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs haproxy: apt-get install haproxy (.ci/run does)")
def test_haproxy_takes_its_configuration() -> None:
    run("haproxy", "-c", "-f", str(DEPLOY / "haproxy" / "haproxy.cfg"))


@needs_promtool
def test_alerts_rise_and_stay_silent_as_their_unit_tests_say() -> None:
    run("promtool", "test", "rules", "alerts_test.yml", cwd=PROMETHEUS)


def test_every_alert_says_what_it_means_and_what_to_do_and_has_a_unit_test() -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    cases = [case["exp_samples"] for test in tests for case in test["promql_expr_test"]]
    seen = [re.findall('alertname="(\\w+)"', sample["labels"])[0] for samples in cases for sample in samples]
    for rule in rules():
        name, notes = rule["alert"], rule["annotations"]
        assert rule["labels"]["severity"] in ("page", "warning", "info")
        assert len(notes["description"]) > 100
        assert notes["summary"].endswith(".")
        assert notes["runbook"] == f"docs/operate.md#{name.lower()}"
        assert name in seen, "it is never seen to rise"


def test_grafana_finds_its_dashboard_and_datasource() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "specedge.yml").read_text())["providers"]
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (grafana,) = (each for each in every_service() if each.name == "grafana")
    mounts = dict(volume.split(":")[:2] for volume in grafana.entries["volumes"])
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    assert (
        grafana.environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
        == f"{provider['options']['path']}/{DASHBOARD.name}"
    )
    assert source["url"] == "http://prometheus:9090"
    dashboard = json.loads(DASHBOARD.read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    shown = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert all(panel["datasource"]["uid"] == source["uid"] and panel["targets"] for panel in shown)
    for one, other in itertools.combinations([panel["gridPos"] for panel in dashboard["panels"]], 2):
        is_beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert is_beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
