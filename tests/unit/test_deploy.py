"""cluster.yaml against Ray's schema, the KubeRay manifests against the fields of their resources, and both against the
lock, the configs that run on them and the code that they name. What they start is tried in tests/ray and tests/e2e."""

import ast
import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from plumbline.config.demand import named
from plumbline.config.file import load_config
from plumbline.importing import PACKAGES
from plumbline.placement.plan import without_gpus

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((Path(__file__).parent / "kuberay_v1.schema.json").read_text())
MANIFESTS = ["rayjob", "rayservice"]


def read(path: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / path).read_text())


def locked(package: str) -> str:
    [version] = re.findall(rf"^{package}==(.+)$", (ROOT / "locks/gpu.txt").read_text(), re.MULTILINE)
    return version


def ray_cluster(name: str) -> dict[str, Any]:
    spec = read(f"deploy/{name}.yaml")["spec"]
    return spec["rayClusterSpec" if name == "rayjob" else "rayClusterConfig"]


def containers(name: str) -> list[dict[str, Any]]:
    cluster = ray_cluster(name)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [one for group in groups for one in group["template"]["spec"]["containers"]]


def images() -> list[str]:
    of_pods = [one["image"] for name in MANIFESTS for one in containers(name)]
    in_comment = re.findall(r"docker build .*-t (\S+)", (ROOT / "deploy/Dockerfile").read_text())
    return [read("cluster.yaml")["docker"]["image"], *of_pods, *in_comment]


def offered(name: str) -> dict[str, dict[str, float]]:
    """What the nodes of each type offer, as Ray's autoscaler reads it."""
    if name == "cluster":
        return {kind: node["resources"] for kind, node in read("cluster.yaml")["available_node_types"].items()}
    cluster = {"metadata": {"name": name, "namespace": "default"}, "spec": ray_cluster(name)}
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    return {"head" if kind == "headgroup" else kind: node["resources"] for kind, node in types.items()}


def test_cluster_yaml_is_what_ray_up_takes() -> None:
    config = prepare_config(read("cluster.yaml"))
    validate_config(config)
    assert set(config["available_node_types"]) == {"head", "learner", "generator", "serve"}
    assert sum(node["max_workers"] for node in config["available_node_types"].values()) <= config["max_workers"]


def test_nothing_is_installed_when_a_node_starts() -> None:
    config = prepare_config(read("cluster.yaml"))  # with Ray's defaults, which install a Ray
    commands = [command for key, value in config.items() if key.endswith("_commands") for command in value]
    assert commands
    assert not [command for command in commands if re.search(r"pip|conda|apt", command)]


def test_ray_refuses_what_is_no_key_of_its_own() -> None:
    config = prepare_config({**read("cluster.yaml"), "workers": 3})
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config)


def test_only_generators_are_on_spot_and_only_the_head_has_no_gpu() -> None:
    types = read("cluster.yaml")["available_node_types"]
    assert {name for name, node in types.items() if "InstanceMarketOptions" in node["node_config"]} == {"generator"}
    for name in MANIFESTS:
        for group in ray_cluster(name)["workerGroupSpecs"]:
            spot = group["template"]["spec"]["nodeSelector"]["karpenter.sh/capacity-type"] == "spot"
            assert spot == (group["groupName"] == "generator")
            assert offered(name)[group["groupName"]]["GPU"] == 1
        assert "GPU" not in offered(name)["head"]


def test_ports_are_closed_and_tokens_on() -> None:
    config = read("cluster.yaml")
    assert config["provider"]["security_group"]["IpPermissions"] == []
    starts = [config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")]
    assert all("RAY_AUTH_MODE=token" in start for start in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert [path for path in config["file_mounts"] if path.endswith(".ray/auth_token")]
    for name in MANIFESTS:
        assert ray_cluster(name)["authOptions"] == {"mode": "token"}
        assert ray_cluster(name)["headGroupSpec"]["serviceType"] == "ClusterIP"


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_has_only_fields_of_its_resource(name: str) -> None:
    manifest = read(f"deploy/{name}.yaml")
    jsonschema.validate(manifest, SCHEMA)
    cluster = {"metadata": {"name": name, "namespace": "default"}, "spec": ray_cluster(name)}
    validate_config(_derive_autoscaling_config_from_ray_cr(cluster))


@pytest.mark.parametrize(
    ("where", "key"),
    [
        (("spec",), "entryPoint"),
        (("spec", "rayClusterSpec"), "workerGroupSpec"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0), "volumeMount"),
    ],
)
def test_a_misspelt_field_is_found(where: tuple[str | int, ...], key: str) -> None:
    manifest = copy.deepcopy(read("deploy/rayjob.yaml"))
    node: Any = manifest
    for part in where:
        node = node[part]
    node[key] = "x"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_mount_has_its_volume_and_no_pod_is_root(name: str) -> None:
    cluster = ray_cluster(name)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert pod["securityContext"]["runAsNonRoot"]
        for one in pod["containers"]:
            assert {mount["name"] for mount in one["volumeMounts"]} <= volumes
            assert not one["securityContext"]["allowPrivilegeEscalation"]


def test_versions_are_those_of_the_lock() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    [own] = re.findall(r'^version = "(.+)"', project, re.MULTILINE)
    assert {image.partition(":")[2] for image in images()} == {f"{own}-ray{locked('ray')}-vllm{locked('vllm')}"}
    assert len(images()) > 4
    for name in MANIFESTS:
        assert ray_cluster(name)["rayVersion"] == locked("ray")
    assert "-r locks/gpu.txt" in (ROOT / "deploy/Dockerfile").read_text()


@pytest.mark.parametrize("name", ["cluster", "rayjob"])
def test_every_role_of_the_example_finds_its_node(name: str) -> None:
    config = load_config(ROOT / "configs/cluster-run.yaml")
    nodes = offered(name)
    fleet = config.fleet
    roles = [fleet.generator, fleet.scorer, fleet.reference, *(p.learner for p in config.pipelines)]
    assert named(without_gpus(config)) == ["generator", "learner"]
    for role in roles:
        assert role.resources
        for resource, amount in role.resources.items():
            assert nodes[resource][resource] >= amount
            assert [kind for kind, node in nodes.items() if resource in node] == [resource]


def test_the_example_fits_into_the_job_s_cluster() -> None:
    config = load_config(ROOT / "configs/cluster-run.yaml")
    groups = {group["groupName"]: group["maxReplicas"] for group in ray_cluster("rayjob")["workerGroupSpecs"]}
    fleet = config.fleet
    asked = sum(section.resources["learner"] for section in (fleet.scorer, fleet.reference))
    asked += sum(p.learner.resources["learner"] for p in config.pipelines)
    assert asked <= groups["learner"]
    assert fleet.generator.replicas == 4 <= groups["generator"]


def test_the_job_runs_a_config_of_the_image() -> None:
    command, verb, config, *_ = read("deploy/rayjob.yaml")["spec"]["entrypoint"].split()
    [workdir] = re.findall(r"^WORKDIR (.+)$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    assert (command, verb) == ("plumbline", "run")
    assert (ROOT / Path(config).relative_to(workdir)).is_file()


def test_the_service_names_an_application_that_there_is() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(read("deploy/rayservice.yaml")["spec"]["serveConfigV2"]))
    [application] = config.applications
    module, _, function = application.import_path.partition(":")
    source = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())  # importing it takes a minute
    assert function in {one.name for one in source.body if isinstance(one, ast.FunctionDef)}
    keys = {env["name"] for one in containers("rayservice") for env in one["env"]}
    assert keys == {"PLUMBLINE_API_KEYS"}
    assert application.args["resources"] == {"serve": 1}
    assert offered("rayservice")["serve"]["serve"] == 1


def test_a_submitted_checkout_is_whole() -> None:
    """A rule such as `runs/`, meant for what runs leave at the top, would drop `plumbline/runs/` from every job."""
    ignored = get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    assert len(ignored) == 2
    code = [path for name in PACKAGES for path in (ROOT / name).rglob("*") if "__pycache__" not in path.parts]
    assert len(code) > 100
    assert not [path for path in code for rule in ignored if rule(path)]
    assert all(any(rule(ROOT / name) for rule in ignored) for name in ("runs/quickstart/events.jsonl", ".venv/bin/ray"))
