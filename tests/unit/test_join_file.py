"""The file by which a process finds a server of its host: who may have written it, and what it may hold."""

import os

import msgspec
import pytest

from dllm.errors import UserError
from dllm.launching import join_file
from dllm.launching.join_file import About, RankAt

SECRET = "5a" * 32
ABOUT = About("", 3, 4096, SECRET, "00" * 16, {"model": "abc"}, ["--slots=4"], 1)


def test_a_join_file_that_others_could_have_written_is_not_believed(tmp_path):
    path = tmp_path / "dllm" / "serve.json"
    join_file.write(path, ABOUT, {0: RankAt("here", 1, ("127.0.0.1", 5), False)})
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert join_file.read(path).about == ABOUT
    path.chmod(0o640)
    with pytest.raises(UserError, match="can be read or written by others: chmod 600"):
        join_file.read(path)
    path.chmod(0o600)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(UserError, match="cannot read --join"):
        join_file.read(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(UserError, match="is no regular file"):
        join_file.read(tmp_path / "pipe")
    with pytest.raises(UserError, match="the server has ended, or is on another host"):
        join_file.read(tmp_path / "nothing")
    path.parent.chmod(0o755)
    with pytest.raises(UserError, match="is not a folder of this user alone"):
        join_file.write(path, ABOUT, {})
    join_file.remove(path, msgspec.structs.replace(ABOUT, secret="ff" * 32))  # which is another server
    assert path.exists()
    join_file.remove(path, ABOUT)
    assert not path.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"", lambda data: data[:-9], lambda data: b"[" * 10**5,
        lambda data: data.replace(b'"size":3', b'"size":-3'),
        lambda data: data.replace(SECRET.encode(), b"00"), lambda data: data.replace(b"127.0.0.1", b"127.0.0.1\\u001b"),
        lambda data: b'{"version": "%s"}' % data[12:17], lambda data: data + b" " * (9 << 20), lambda data: b"\xff\xfe",
    ],
)  # fmt: skip
def test_a_damaged_join_file_is_refused(tmp_path, change):
    path = tmp_path / "dllm" / "serve.json"
    join_file.write(path, ABOUT, {0: RankAt("here", 1, ("127.0.0.1", 5), False)})
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before
    with pytest.raises(UserError, match=r"is no join file of a server|is of dllm .*, this is dllm"):
        join_file.read(path)


def test_a_join_file_of_another_version_names_both(tmp_path):
    path = tmp_path / "dllm" / "serve.json"
    join_file.write(path, ABOUT, {})
    path.write_bytes(b'{"version": "0.1.9", "all else": "is new"}')
    with pytest.raises(UserError, match=r"is of dllm 0\.1\.9, this is dllm .*: join with the same version"):
        join_file.read(path)
