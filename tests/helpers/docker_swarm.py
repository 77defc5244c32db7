"""A real Docker Swarm on this machine: a dockerd in each of the hosts of benchmarks/hosts.py, three of them managers.

Debian's docker.io is enough, and need not be installed: DLLM_DOCKER names the folder in which its packages were unpacked.
There is no registry, so the image holds a user, folders and dllm-node only; programs are mounted from this machine.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import time

from benchmarks import hosts as network
from dllm.kernels import compile

from .launch import BIN, SOURCE

DEPLOY = SOURCE / "docs" / "deploy"
IMAGE = "dllm-test:1"
MANAGERS = 3
SERVICES = "node", "supervisor"
UNPACKED = os.environ.get("DLLM_DOCKER", "")
PROGRAMS = ("dockerd", "containerd", "runc", "docker-init", "docker", "sshd", "ssh-keygen", "nsenter")
PACKAGES = "docker.io containerd runc openssh-server libwrap0"
PATH = os.pathsep.join([*(f"{UNPACKED}/usr/{name}" for name in ("bin", "sbin") if UNPACKED), os.environ["PATH"], "/usr/sbin"])
LIBRARIES = f"{UNPACKED}/usr/lib/x86_64-linux-gnu:{UNPACKED}/lib/x86_64-linux-gnu" if UNPACKED else ""
DOCKERD = """
hostname "$0"
mkdir -p /run/containerd /run/docker
mount -t tmpfs tmpfs /run/containerd
mount -t tmpfs tmpfs /run/docker
exec dockerd --data-root "$1/data" --exec-root "$1/exec" -H "unix://$1/socket" --pidfile "$1/pid" --cgroup-parent "/$2" \
    --iptables=false --ip6tables=false --bridge=none
"""


def missing():
    """Why there can be no Swarm here; None where there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"there is no {', '.join(absent)}: run .ci/tools FOLDER, then DLLM_DOCKER=FOLDER/docker"
    return network.missing()


class Swarm:
    """Up from the beginning to the end of its `with`; its nodes are numbered from 1, as the hosts are."""

    def __init__(self, folder, hosts):
        self.folder, self.hosts, self.daemons = pathlib.Path(folder), hosts, []
        self.group = f"dllm-{os.getpid()}"
        self.environment = {**os.environ, "PATH": PATH, "LD_LIBRARY_PATH": LIBRARIES or os.environ.get("LD_LIBRARY_PATH", "")}

    def __enter__(self):
        with contextlib.ExitStack() as where_it_fails:
            where_it_fails.callback(self._end)
            for number, name in enumerate(self.hosts.names, 1):
                self._start(number, name)
            for number in self.numbers:
                until(lambda n=number: self.docker(n, "info", check=False)[0] == 0, f"dockerd {number}", 30)
            self._import()
            self.docker(1, "swarm", "init", *self._address(1))
            self.docker(1, "swarm", "update", "--dispatcher-heartbeat", "2s")
            for number in self.numbers[1:]:
                token = self.docker(1, "swarm", "join-token", "-q", "manager" if number <= MANAGERS else "worker")[1].strip()
                self.docker(number, "swarm", "join", "--token", token, *self._address(number), "10.77.0.1:2377")
            where_it_fails.pop_all()
        return self

    def __exit__(self, *error):
        self._end()

    @property
    def numbers(self):
        return range(1, network.COUNT + 1)

    @staticmethod
    def _address(number):
        return "--advertise-addr", f"10.77.0.{number}", "--listen-addr", f"10.77.0.{number}:2377"

    def _start(self, number, name):
        (self.folder / f"n{number}").mkdir()
        words = ["nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "--mount", "/bin/bash", "-c", DOCKERD]
        with open(self.folder / f"n{number}" / "log", "wb") as log:
            daemon = subprocess.Popen([*words, name, self.folder / f"n{number}", self.group], env=self.environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)  # fmt: skip
        self.daemons.append(daemon)

    def _import(self):
        """Make the image on every node, with the user, variables and volumes of the Dockerfile."""
        lines = (DEPLOY / "Dockerfile").read_text().rpartition("\nFROM ")[2].splitlines()
        kept = [line for line in lines if re.match(r"(ENV|USER|WORKDIR|VOLUME|EXPOSE|ENTRYPOINT) ", line)]
        kept.append(f"ENV PATH=/opt/dllm:{BIN}:{PATH}")
        changes = [word for line in kept for word in ("--change", line)]
        for number in self.numbers:
            self.docker(number, "import", *changes, "-", IMAGE, given=root())

    def docker(self, number, *words, check=True, given=b"", variables=None, limit=60):
        """Exit code and output of docker on a node."""
        env = self.environment | {"DOCKER_HOST": f"unix://{self.folder}/n{number}/socket"} | (variables or {})
        done = subprocess.run(["docker", *map(str, words)], env=env, input=given, timeout=limit, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        text = done.stdout.decode(errors="replace")
        assert not check or done.returncode == 0, f"docker {' '.join(map(str, words))}: {text}"
        return done.returncode, text

    def report(self, number):
        """What a manager tells of the stack."""
        asked = (
            ("node", "ls"),
            ("stack", "ps", "--no-trunc", "dllm"),
            *(("service", "logs", "-t", f"dllm_{name}") for name in SERVICES),
        )
        return "".join(f"$ docker {' '.join(words)}\n{self._told(number, words)}" for words in asked)

    def _told(self, number, words):
        """Output of a command; where it waits for a node that is gone, nothing."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.docker(number, *words, check=False, limit=15)[1]
        return "no answer\n"

    def shell(self, number, line):
        """Run a line of a shell in which `docker` means a node."""
        env = self.environment | {"DOCKER_HOST": f"unix://{self.folder}/n{number}/socket"}
        subprocess.run(["bash", "-euo", "pipefail", "-c", line], env=env, timeout=60, check=True)

    def volume(self, name, number):
        """Where the volume dllm_NAME of a node lies."""
        return self.folder / f"n{number}" / "data" / "volumes" / f"dllm_{name}" / "_data"

    def fill(self, name, number, source, target):
        """Copy a folder into the volume dllm_NAME of a node, by a container, in which it is /NAME."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(source, target)
        words = "--network", "host", "-v", f"dllm_{name}:/{name}", "-v", "/usr:/usr:ro", IMAGE, "tar", "xC", f"/{name}"
        self.docker(number, "run", "--rm", "-i", *words, given=packed.getvalue())

    def override(self, environment):
        """What a stack needs here beside its own file, for its services `node` and `supervisor`: a path."""
        cache = self.folder / "cache"  # kernels that this machine has compiled; the user of the image is no other than 1000
        shutil.copytree(compile.CACHE, cache / compile.CACHE.name)
        for path in (cache, *cache.rglob("*")):
            os.chown(path, 1000, 1000)
        folders = dict.fromkeys(map(str, ("/usr", sys.base_prefix, sys.prefix, SOURCE, *filter(None, [UNPACKED]))))
        service = {
            "environment": {"LD_LIBRARY_PATH": LIBRARIES, "PYTHONPATH": str(SOURCE), **environment},
            "volumes": [f"{folder}:{folder}:ro" for folder in folders] + [f"{cache}:/cache/dllm"],
        }
        file = self.folder / "override.yml"
        file.write_text(json.dumps({"version": "3.8", "services": dict.fromkeys(SERVICES, service)}))
        return file

    def kill(self, number):
        """As when the power fails: every process of a node, be it in a container or not, is killed, and its link is cut."""
        self.hosts.cut(number)
        self.hosts.kill(number)

    def _end(self):
        for number in range(1, len(self.daemons) + 1):
            self.kill(number)
        for daemon in self.daemons:
            daemon.wait(10)
        for folder in pathlib.Path("/sys/fs/cgroup").glob(f"**/{self.group}"):
            for inside, _, _ in os.walk(folder, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(inside)


def root():
    """The image's files, as a tar: a user, folders, and links to where /usr is mounted."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:

        def add(name, data=None, owner=0, mode=0o755, link=None):
            info = tarfile.TarInfo(name)
            info.uid = info.gid = owner
            info.mode, info.size = mode, len(data or b"")
            info.type = tarfile.SYMTYPE if link else tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            info.linkname = link or ""
            tar.addfile(info, io.BytesIO(data or b""))

        for name in ("etc", "home", "opt", "opt/dllm", "proc", "run", "sbin", "sys", "usr", "dev"):
            add(name)
        for name in ("data", "cache", "home/dllm"):
            add(name, owner=1000)
        add("tmp", mode=0o1777)
        for name in ("bin", "lib", "lib64"):
            add(name, link=f"usr/{name}")
        add("etc/passwd", b"root:x:0:0:root:/:/bin/sh\ndllm:x:1000:1000::/home/dllm:/bin/bash\n", mode=0o644)
        add("etc/group", b"root:x:0:\ndllm:x:1000:\n", mode=0o644)
        add("opt/dllm/dllm-node", (DEPLOY / "dllm-node").read_bytes())
    return out.getvalue()


def until(condition, what, limit):
    """Wait until condition() is true, at most `limit` seconds."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + limit, f"no {what} after {limit} s"
        time.sleep(0.2)
    print(f"{what}: {time.monotonic() - begin:.1f} s")
