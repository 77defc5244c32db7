"""What lies on the private disks of benchmarks/hosts.py: who has a sound copy of what, and the disks as they were."""

import contextlib
import hashlib
import json
import pathlib
import shutil

from benchmarks import hosts as network

HOSTS = range(1, network.COUNT + 1)


def digest(path):
    """The sha256 of a file, None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return None


def manifest(hosts, folder):
    """The manifest.json of a folder, of the first host that has it."""
    found = (hosts.disk(number) / folder / "manifest.json" for number in HOSTS)
    return json.loads(next(path for path in found if path.exists()).read_text())


def step_folder(run, step):
    return pathlib.Path(run, "checkpoints", f"step-{step:08d}")


def slices(hosts, run, step):
    """path below a disk -> numbers of the hosts that have it sound, of every rank's part of a checkpoint."""
    folder = step_folder(run, step)
    digests = manifest(hosts, folder)["sha256"]
    names = [folder / f"rank-{rank:05d}-of-{len(digests):05d}.h5" for rank in range(len(digests))]
    return _holders(hosts, zip(names, digests, strict=True))


def shards(hosts, corpus):
    """path below a disk -> numbers of the hosts that have it sound, of every shard of a corpus."""
    parts = [part for split in manifest(hosts, corpus)["splits"].values() for part in split["shards"]]
    return _holders(hosts, ((pathlib.Path(corpus, part["name"]), part["sha256"]) for part in parts))


def _holders(hosts, files):
    return {path: [number for number in HOSTS if digest(hosts.disk(number) / path) == sha256] for path, sha256 in files}


def files(folder):
    """path -> sha256 of all files of a folder, but for what says who owns a run."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "owner")
    return {path.relative_to(folder): digest(path) for path in paths}


def keep(hosts, place):
    """Copy all disks to a folder."""
    for number in HOSTS:
        shutil.copytree(hosts.disk(number), place / str(number))


def bring_back(hosts, place):
    """Make all disks what `keep` has found."""
    for number in HOSTS:
        hosts.wipe(number)
        shutil.copytree(place / str(number), hosts.disk(number), dirs_exist_ok=True)
