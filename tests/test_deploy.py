"""The files that others run: each against the schema of what runs it, and against what cluster/app.py asks for."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertmesh.cluster.app import actor_options
from expertmesh.config import NODE, ClusterConfig, from_mapping

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
CLUSTERS = ["cluster", "cluster-aws", "cluster-gcp"]
ROLES = ("attention", "expert", "gateway")


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / f"{name}.yaml").read_text())
    return loaded


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """By Ray's own launcher, as `ray up` does first."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    done: dict[str, Any] = prepare_config(config)
    validate_config(done)
    return done


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_up_accepts_the_file_and_refuses_a_misspelt_one(name: str):
    assert prepared(load(name))["cluster_name"] == "expertmesh"
    with pytest.raises(Exception, match="worker_start_ray_command"):
        prepared(load(name) | {"worker_start_ray_command": []})


@pytest.mark.parametrize("name", ["cluster-aws", "cluster-gcp"])
def test_every_role_has_a_node_type_that_fits_a_whole_number_of_its_replicas(name: str):
    config = prepared(load(name))
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["max_workers"] == 0
    serving = ClusterConfig(model="m", role_resources=True, device="cuda")
    for role in ROLES:
        asked = actor_options(serving, role)
        homes = [t["resources"] for t in types.values() if role in t["resources"]]
        assert homes, f"no host offers {role}"
        for offered in homes:
            by_role = offered[role] // asked["resources"][role]
            assert by_role >= 1
            if asked["num_gpus"]:
                assert offered["GPU"] // asked["num_gpus"] == by_role, "GPUs would lie idle, or replicas would wait"
    assert "GPU" not in types["head"]["resources"]
    for kind in ("attention", "expert"):
        assert types[kind]["min_workers"] <= types[kind]["max_workers"]
        assert sum(t["max_workers"] for t in types.values()) <= config["max_workers"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_start_commands_are_shell_and_name_what_exists(name: str):
    config = load(name)
    environment = (DEPLOY / "hosts" / "environment.sh").read_text()
    commands = [
        *config["head_start_ray_commands"],
        *config["worker_start_ray_commands"],
        *config.get("setup_commands", []),
    ]
    for script in (environment, *commands):
        assert subprocess.run(["bash", "-n", "-c", script], capture_output=True).returncode == 0, script
    defined = set(re.findall(r"^(\w+)\(\)", environment, re.MULTILINE))
    scripts = set(
        re.findall(
            r"^([\w-]+) = ", (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[2], re.MULTILINE
        )
    )
    for command in commands:
        for tool in re.findall(r"(in_background|roles_of|expertmesh-host|expertmesh)(?= )", command):
            assert tool in defined | scripts
    for start in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "expertmesh-host stop" in config[start][0], "`ray up` on a running host must end what runs there"
        assert "expertmesh-host watch" in config[start][-1]
        assert all("environment.sh" in command for command in config[start])
    for source in config["file_mounts"].values():
        assert source.startswith("~") or source == "dist" or (ROOT / source).exists(), source


def test_the_environment_says_what_rays_processes_must_agree_on():
    shown = subprocess.run(
        [
            "bash",
            "-c",
            f"SSH_CONNECTION='1.1.1.1 5 10.0.0.7 22'; . {DEPLOY}/hosts/environment.sh; env; echo HOST=$HOST_IP",
        ],
        capture_output=True,
        text=True,
    ).stdout
    for line in ("RAY_AUTH_MODE=token", "RAY_enable_autoscaler_v2=0", "HOST=10.0.0.7"):
        assert line in shown.splitlines()
    assert "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S=1" in shown


def test_roles_are_those_of_the_host_or_of_everybody(tmp_path: Path):
    hosts = tmp_path / "expertmesh" / "hosts"
    hosts.mkdir(parents=True)

    def roles_of(host: str, roles: str) -> str:
        (hosts / "roles").write_text(roles)
        script = f"export HOME={tmp_path}; . {DEPLOY}/hosts/environment.sh; roles_of {host}"
        return subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout.strip()

    shipped = (DEPLOY / "hosts" / "roles").read_text()
    assert roles_of("10.0.0.1", shipped) == '{"gateway": 1}'
    assert roles_of("10.0.0.99", shipped) == '{"gateway": 1, "attention": 8, "expert": 8}'
    assert roles_of("b", '* {"x": 1}\nb {"y": 2}\n') == roles_of("b", 'b {"y": 2}\n* {"x": 1}\n') == '{"y": 2}'
    assert roles_of("c", 'b {"y": 2}\n') == "{}"


def test_serve_yaml_is_a_configuration_for_many_hosts():
    config = from_mapping(ClusterConfig, load("hosts/serve"))
    assert (config.network.interface, config.network.gateway_host) == (NODE, NODE)
    assert config.gateway_per_node
    assert config.role_resources
    here = config.on_node("10.1.2.3").network
    assert (here.interface, here.gateway_host) == ("10.1.2.3", "10.1.2.3")
    assert ClusterConfig(model="m").on_node("10.1.2.3") == ClusterConfig(model="m"), "loopback stays loopback"


def test_the_dockerfile_copies_what_exists_and_installs_pinned_versions():
    """It cannot be built here; its grammar, its stages and its sources are looked at."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    known = {"ARG", "FROM", "RUN", "COPY", "WORKDIR", "ENV", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}
    assert {word for word, _ in lines} <= known
    stages = [re.search(r" AS (\w+)", rest) for word, rest in lines if word == "FROM"]
    assert len(stages) == 2
    assert stages[0] is not None
    for word, rest in lines:
        if word == "COPY" and "--from=" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
        if word == "COPY" and "--from=" in rest:
            assert f"--from={stages[0][1]}" in rest
        if word == "RUN" and "pip install" in rest:
            assert "--constraint constraints.txt" in rest
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".venv", ".git", "dist"} <= set(ignored)
    assert not {"constraints.txt", "pyproject.toml", "deploy"} & set(ignored)
    run_as = [rest for word, rest in lines if word == "USER"]
    assert run_as == ["ray"]
