"""Where the shards of a data set are: a local folder, a tar, or a URL; each with its index."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from mser_dist.errors import UserError
from mser_dist.files import write_json
from mser_dist.shards import index as shard_index
from mser_dist.shards.index import REPACK
from mser_dist.shards.reader import Shard
from mser_dist.shards.remote import RemoteCache, is_remote
from mser_dist.shards.writer import DATASET_FILE, LOCK_FILE

_HASH = re.compile("[0-9a-f]{64}")


def list_shards(path: str | Path) -> tuple[list[Path], dict[str, Any] | None]:
    """The shards of a local data set, and its dataset.json (None for a single tar or a folder of tars without one)."""
    path = check_there(path)
    if path.is_file():
        return [path], None
    if (path / LOCK_FILE).exists():
        raise UserError(f"{path}: a data set that is still being written, or was left by a run that died; {REPACK}")
    if (path / DATASET_FILE).exists():
        description = shard_index.read_facts(path / DATASET_FILE)
        return [path / name for name in facts(description, str(path / DATASET_FILE))], description
    return sorted(path.glob("*.tar")), None


def check_there(path: str | Path) -> Path:
    """The path of a local set; `UserError` where there is neither a folder nor a tar."""
    name, path = str(path), Path(str(path).removeprefix("file://"))
    if path.is_dir() and name:
        if not any((path / there).exists() for there in (LOCK_FILE, DATASET_FILE)) and not any(path.glob("*.tar")):
            raise UserError(f"{path}: holds no .tar shard; give a folder of shards (mser pack makes one)")
        return path
    if not path.exists() and any(sign in name for sign in "*?[{"):
        raise UserError(f"{name}: no such data set, and patterns are not filled in; give the folder of shards")
    if not path.is_file():
        raise UserError(
            f"{name or repr(name)}: no such data set; give a folder of shards or a .tar (mser pack makes one)"
        )
    if path.suffix != ".tar":
        raise UserError(f"{path}: neither a folder of shards nor a .tar; give one of them (mser pack makes one)")
    return path


def facts(description: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """What a dataset.json says of each shard: file → {count, bytes, sha256, index: SHA-256 of its index}.

    UserError with `name` where it does not.
    """
    try:
        listed = [shard for _, split in sorted(description["splits"].items()) for shard in split["shards"]]
        result = {shard["file"]: shard for shard in listed if shard.keys() >= {"count", "bytes", "sha256", "index"}}
        strange = any(Path(file).name != file for file in result)
        # They become names of files in the cache.
        strange |= not all(_HASH.fullmatch(shard[key]) for shard in result.values() for key in ("sha256", "index"))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{name}: does not list its shards; {REPACK}") from None
    if strange or len(result) < len(listed):
        raise UserError(f"{name}: does not describe each of its shards; {REPACK}")
    return result


def state_of(path: str | Path) -> list[Any]:
    """A set's name, and what tells it from what it was before it was written anew; JSON. A remote set's is its URL."""
    if is_remote(path):
        return [str(path)]
    place = Path(str(path).removeprefix("file://")).absolute()
    found: list[Any] = [str(path), str(place)]
    for one in (place, place / DATASET_FILE):
        with suppress(OSError):
            status = one.stat()
            found += [status.st_mtime_ns, status.st_size, status.st_ino]
    return found


def extra_shards(path: str | Path, expected: Mapping[str, Any]) -> list[Path]:
    """The tars of a local set that its dataset.json does not list: nobody would read them, and not know it."""
    folder = Path(str(path).removeprefix("file://"))
    return sorted(shard for shard in folder.glob("*.tar") if shard.name not in expected)


def load_all(path: str | Path, cache: RemoteCache) -> Iterator[tuple[Shard, dict[str, Any]]]:
    """Every shard of a set with its index, held against dataset.json where there is one."""
    if is_remote(path):
        yield from _load_remote(str(path).rstrip("/"), cache)
        return
    shards, description = list_shards(path)
    expected = facts(description, str(path)) if description else {}
    if expected and (extra := extra_shards(path, expected)):
        raise UserError(f"{extra[0]}: an extra shard that {DATASET_FILE} does not list; remove it, or {REPACK}")
    for shard in shards:
        fact = expected.get(shard.name)
        index_path = shard.with_name(shard.name + shard_index.SUFFIX)
        if fact and shard.is_file():
            if not index_path.exists():
                raise UserError(f"{shard}: its index is missing; {REPACK}")
            _hold_against(index_path.read_bytes(), fact, str(index_path))
        index = shard_index.load(shard)
        yield Shard(str(shard), index["bytes"], index["sha256"]), index


def _load_remote(url: str, cache: RemoteCache) -> Iterator[tuple[Shard, dict[str, Any]]]:
    if url.endswith(".tar"):
        yield from _load_remote_foreign([url], cache)
        return
    try:
        raw = cache.read(f"{url}/{DATASET_FILE}")
    except UserError as error:
        if "not there" not in str(error):
            raise
        shards = cache.shards(url)
        if not shards:
            raise UserError(f"{url}: holds neither {DATASET_FILE} nor a .tar shard; check the URL") from None
        yield from _load_remote_foreign(shards, cache)
        return
    expected = facts(shard_index.parse_json(raw, f"{url}/{DATASET_FILE}"), f"{url}/{DATASET_FILE}")

    def fetch(name: str) -> dict[str, Any]:
        shard = f"{url}/{name}"
        path = cache.path_of(shard, expected[name]["sha256"])
        path = path.with_name(path.name + shard_index.SUFFIX)
        if path.exists() and _sha256(path.read_bytes()) == expected[name]["index"]:
            return shard_index.parse(path.read_bytes(), str(path))
        raw = cache.read(shard + shard_index.SUFFIX)
        _hold_against(raw, expected[name], shard + shard_index.SUFFIX)
        index = shard_index.parse(raw, shard + shard_index.SUFFIX)
        with suppress(OSError):  # no room or no permission: fetched again by the next run
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, index, compact=True)
        return index

    with ThreadPoolExecutor(16) as pool:  # a thousand small files, one after the other, would take minutes
        for name, index in zip(expected, pool.map(fetch, expected), strict=True):
            yield Shard(f"{url}/{name}", index["bytes"], index["sha256"]), index


def _load_remote_foreign(urls: Sequence[str], cache: RemoteCache) -> Iterator[tuple[Shard, dict[str, Any]]]:
    """Tars without a dataset.json: each is fetched once to be indexed."""
    for url in urls:
        identity = cache.identity(url)
        path = cache.path_of(url, identity)
        index_path = path.with_name(path.name + shard_index.SUFFIX)
        if index_path.exists() and shard_index.is_of_this_scan(raw := index_path.read_bytes()):
            index = shard_index.parse(raw, str(index_path))
        else:
            try:
                index = shard_index.load(cache.get(url, identity, check=False))
            except UserError as error:
                path.unlink(missing_ok=True)  # it may have arrived damaged
                raise UserError(f"{url}: {error}") from None
        yield Shard(url, index["bytes"], identity, own_hash=False), index


def _hold_against(raw: bytes, fact: Mapping[str, Any], name: str) -> None:
    """UserError unless an index's bytes are those that dataset.json knows: with it, all that the index says holds."""
    if _sha256(raw) != fact["index"]:
        raise UserError(f"{name}: not the index that dataset.json beside it lists; {REPACK}")


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
