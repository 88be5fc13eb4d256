import contextlib
import functools
import http.server
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mser_dist.errors import UserError
from mser_dist.shards import remote
from mser_dist.shards.remote import RemoteCache
from mser_dist.shards.shard_set import ShardSet
from mser_dist.shards.verify import verify
from mser_dist.stream.examples import Examples
from mser_dist.stream.features import Features
from mser_dist.stream.loader import Example
from mser_dist.stream.plan import Plan, Position
from mser_dist.stream.steps import training_steps
from tests.unit.made_up_set import write_set


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("MSER_CACHE", str(tmp_path / "default-cache"))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("remote") / "set")


class Handler(http.server.SimpleHTTPRequestHandler):
    failures = 0  # so many answers are an error first
    asked: list[str] = []  # noqa: RUF012 (shared by all requests on purpose)

    def do_GET(self) -> None:
        Handler.asked.append(self.path)
        if Handler.failures > 0 and self.path.endswith(".tar"):
            Handler.failures -= 1
            self.send_error(503)
            return
        super().do_GET()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def url(local: Path, tmp_path: Path) -> Iterator[str]:
    """A real web server over a copy of the set."""
    shutil.copytree(local, tmp_path / "www" / "set")
    Handler.failures, Handler.asked = 0, []
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "www"))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/set"
    server.shutdown()
    server.server_close()


@pytest.fixture
def memory(local: Path) -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    for path in local.iterdir():
        fs.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    yield "memory://bucket/set"
    with contextlib.suppress(FileNotFoundError):
        fs.rm("/bucket", recursive=True)


def everything(shards: ShardSet) -> list[tuple[str, bytes]]:
    return [(sample.key, sample.audio) for sample in map(shards.read, range(len(shards)))]


@pytest.mark.parametrize("kind", ["memory", "http", "file"])
def test_a_remote_set_reads_like_a_local_one(kind: str, local: Path, tmp_path: Path, request: Any) -> None:
    url = {"memory": "memory", "http": "url"}.get(kind)
    address = request.getfixturevalue(url) if url else f"file://{local}"
    cache = RemoteCache(tmp_path / "cache")
    shards = ShardSet.open(address, cache=cache)
    assert everything(shards) == everything(ShardSet.open(local))
    assert shards.fingerprint() == ShardSet.open(local).fingerprint()
    assert address.removeprefix("file://") in shards.where(0)
    if kind == "http":  # each shard and index was fetched once, and the second time none is
        fetched = [path for path in Handler.asked if ".tar" in path]
        assert len(fetched) == len(set(fetched)) == 8
        assert everything(ShardSet.open(address, cache=cache)) == everything(shards)
        assert len([path for path in Handler.asked if ".tar" in path]) == 8


def test_a_remote_folder_without_dataset_json_is_indexed_on_first_use(memory: str, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    expected = everything(ShardSet.open(memory, cache=RemoteCache(tmp_path / "a")))
    for path in fs.glob("/bucket/set/*.json"):
        fs.rm(path)
    cache = RemoteCache(tmp_path / "b")
    assert sorted(everything(ShardSet.open(memory, cache=cache))) == sorted(expected)
    assert len(ShardSet.open(f"{memory}/test-000000.tar", cache=cache)) == 4
    for path in fs.glob("/bucket/set/*.tar"):
        fs.rm(path)
    with pytest.raises(UserError, match=r"holds neither dataset\.json nor a \.tar shard"):
        ShardSet.open(memory, cache=cache)


def test_a_transfer_that_fails_is_tried_again(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = ShardSet.open(url, cache=RemoteCache(tmp_path / "cache"))
    Handler.failures = 2
    assert shards.read(0).audio
    assert capsys.readouterr().err.count("once more in") == 2
    Handler.failures = 99
    with pytest.raises(UserError, match=r"could not be fetched in 4 attempts \(.*503.*\)"):
        shards.read(len(shards) - 1)


def test_what_arrives_damaged_is_not_kept(url: str, tmp_path: Path) -> None:
    shards = ShardSet.open(url, cache=RemoteCache(tmp_path / "cache"))
    shard = tmp_path / "www" / "set" / "test-000000.tar"
    data = bytearray(shard.read_bytes())
    data[2000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"test-000000\.tar: could not be fetched .*SHA-256"):
        shards.read(0)
    assert not list((tmp_path / "cache").glob("*test-000000.tar"))
    assert not list((tmp_path / "cache").glob(".*partial"))
    assert not list((tmp_path / "cache").glob(".*claim"))


def test_a_shard_that_is_gone_is_named(url: str, tmp_path: Path) -> None:
    shards = ShardSet.open(url, cache=RemoteCache(tmp_path / "cache"))
    (tmp_path / "www" / "set" / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"set/train-000001\.tar: not there"):
        everything(shards)


def test_the_cache_is_bounded_and_keeps_what_was_used_last(local: Path, memory: str, tmp_path: Path) -> None:
    size = max(path.stat().st_size for path in local.glob("*.tar"))
    cache = RemoteCache(tmp_path / "cache", max_bytes=2.5 * size)
    shards = ShardSet.open(memory, cache=cache)
    expected = everything(ShardSet.open(local))
    for _ in range(2):
        for number, i in enumerate(list(range(0, len(shards), 3)) * 2):
            assert (shards.key(i), shards.read(i).audio) == expected[i]
            held = list((tmp_path / "cache").glob("*.tar"))
            assert sum(path.stat().st_size for path in held) <= 2.5 * size, number
    tiny = ShardSet.open(memory, cache=RemoteCache(tmp_path / "tiny", max_bytes=100))
    with pytest.raises(UserError, match=r"more than the whole cache: raise data.cache_gb"):
        tiny.read(0)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("claimant", [0, 1])
def test_a_claim_of_a_dead_process_does_not_stop_others(memory: str, tmp_path: Path, claimant: int) -> None:
    cache = RemoteCache(tmp_path / "cache")
    shards = ShardSet.open(memory, cache=cache)
    path = cache.path_of(shards.shards[0].name, shards.shards[0].sha256)
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    # The process is gone, or its number is another's by now.
    path.with_name(f".{path.name}.claim").write_text(f"{os.uname().nodename} {claimant or gone} 1")
    assert shards.read(0).audio
    assert not list((tmp_path / "cache").glob(".*claim"))


def test_a_rotten_copy_is_replaced_for_every_reader_that_has_it_open(memory: str, tmp_path: Path) -> None:
    readers = [ShardSet.open(memory, cache=RemoteCache(tmp_path / "cache")) for _ in range(2)]
    expected = [reader.read(0).audio for reader in readers]
    for copy in (tmp_path / "cache").glob("*.tar"):
        with copy.open("r+b") as file:
            file.write(bytes(copy.stat().st_size))
    assert [reader.read(0).audio for reader in readers] == expected


def test_a_local_copy_that_rots_is_fetched_again(url: str, tmp_path: Path) -> None:
    shards = ShardSet.open(url, cache=RemoteCache(tmp_path / "cache"))
    before = everything(shards)
    for copy in (tmp_path / "cache").glob("*.tar"):
        copy.write_bytes(bytes(copy.stat().st_size))
    assert everything(ShardSet.open(url, cache=RemoteCache(tmp_path / "cache"))) == before


def test_what_a_killed_fetch_left_is_removed(memory: str, tmp_path: Path) -> None:
    left = tmp_path / "cache" / ".x.tar.1.2.partial"
    left.parent.mkdir()
    left.touch()
    os.utime(left, (0, 0))
    ShardSet.open(memory, cache=RemoteCache(tmp_path / "cache")).read(0)
    assert not left.exists()


def test_many_processes_fetch_a_shard_once(url: str, tmp_path: Path) -> None:
    shards = ShardSet.open(url, cache=RemoteCache(tmp_path / "cache"))
    expected = everything(ShardSet.open(tmp_path / "www" / "set"))
    Handler.asked = []
    threads = [threading.Thread(target=lambda: results.append(everything(shards) == expected)) for _ in range(8)]
    results: list[bool] = []
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8
    assert len([path for path in Handler.asked if path.endswith(".tar")]) == 4


def keys(clips: list[Example]) -> dict[str, Any]:
    return {"index": [clip.index for clip in clips]}


@pytest.mark.parametrize("workers", [0, 2])
def test_training_reads_a_remote_set_ahead_in_workers(url: str, tmp_path: Path, workers: int) -> None:
    shards = ShardSet.open(url, keep={"label": "happy"}, cache=RemoteCache(tmp_path / "cache"))
    clips = Examples(shards, ["happy"], Features())
    steps = training_steps(clips, Plan(len(clips), 2, 0), Position(), 12, None, 0, 1, keys, workers)
    found = [i for step in steps for i in step.batches[0]["index"]]
    assert set(found) == set(range(len(clips)))
    tars = [path for path in Handler.asked if path.endswith(".tar")]
    assert len(tars) == len(set(tars))


def test_the_next_shards_are_fetched_in_the_background(memory: str, tmp_path: Path) -> None:
    cache = RemoteCache(tmp_path / "cache")
    shards = ShardSet.open(memory, cache=cache)
    for shard in shards.shards:
        cache.ahead(shard.name, shard.sha256, shard.bytes)
    deadline = time.monotonic() + 20
    while len(list((tmp_path / "cache").glob("*.tar"))) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("nosuch://bucket/set", "not a URL that can be read"),
        ("memory://nothing/here", "holds neither dataset.json nor a .tar shard"),
    ],
)
def test_a_url_that_leads_nowhere(address: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says) as caught:
        ShardSet.open(address, cache=RemoteCache(tmp_path))
    assert "\n" not in str(caught.value)


def test_only_local_sets_are_verified(memory: str) -> None:
    with pytest.raises(UserError, match="only a local data set can be verified"):
        verify(memory)
