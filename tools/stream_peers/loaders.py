"""The loaders that are compared, each a process of its own, in an environment of its own where it needs one."""

import hashlib
import json
import os
import select
import site
import subprocess
import sys
import venv
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 1200  # seconds for one answer of a loader


@dataclass(frozen=True)
class Peer:
    module: str  # in tools/stream_peers
    features: str  # `worker.EXTRACTORS`
    package: str | None = None  # whose version is told
    requires: tuple[str, ...] = ()  # what its environment has beside this one's packages


PEERS = {
    "ours": Peer("ours", "ours", "mser-dist"),
    "webdataset+longest": Peer("wds", "longest of 16", "webdataset"),
    "webdataset+one-by-one": Peer("wds", "longest", "webdataset"),
    "webdataset+30s": Peer("wds", "30s", "webdataset"),
    "hf-datasets": Peer(
        "hf", "longest", "datasets", ("datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19", "xxhash==4.1.0")
    ),
    "lhotse-shar": Peer(
        "shar",
        "longest",
        "lhotse",
        (
            "lhotse==1.33.0",
            "audioread==3.1.0",
            "cytoolz==1.2.0",
            "intervaltree==3.2.1",
            "tabulate==0.10.0",
            "toolz==1.2.0",
        ),
    ),
    # Its clouds' clients, and transformers < 5 for its text data sets, are not needed to read local shards.
    "mosaicml-streaming": Peer(
        "mds",
        "longest",
        "mosaicml-streaming",
        (
            "mosaicml-streaming==0.13.0",
            "numpy==2.1.3",
            "brotli==1.2.1",
            "catalogue==2.0.10",
            "cramjam==2.14.0",
            "python-snappy==0.7.3",
            "xxhash==4.1.0",
            "zstd==1.5.7.2",
        ),
    ),
    "plain-files": Peer("plain", "longest", "soundfile"),
}
OWN_FORMAT = ("hf", "shar", "mds")  # modules that write a container of their own


class PeerError(Exception):
    """A loader could not be installed, or failed; the message is for its row."""


def environment(peer: Peer, folder: Path) -> Path:
    """The Python that runs a peer: this one, or that of an environment in `folder`, made on first use.

    Such an environment holds the pinned packages and sees this one's behind them, so that every loader has the same
    torch and soundfile. pip never sees the latter, so it cannot change them.
    """
    if not peer.requires:
        return Path(sys.executable)
    made_of = json.dumps([peer.requires, sys.version, sys.prefix])
    home = folder / f"{peer.module}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
    python = home / "bin" / "python"
    packages = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    behind = packages / "behind.pth"  # written last: its presence says that the environment is whole
    if not behind.exists():
        venv.create(home, clear=True, symlinks=True)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
        done = subprocess.run([*pip, *peer.requires], capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
            raise PeerError(f"cannot be installed: {errors[-1]}")
        behind.write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
    return python


class Loader:
    """A running `worker`. Raises `PeerError`."""

    def __init__(self, peer: Peer, envs: Path, log: Path) -> None:
        self.log = log
        python = environment(peer, envs)
        environ = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(log.with_suffix(".cache")),
            "TMPDIR": str(log.parent),  # mosaicml-streaming leaves lock files there
        }
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [python, "-m", "tools.stream_peers.worker", peer.module, peer.features],
                cwd=ROOT,
                env=environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                encoding="utf-8",
                errors="replace",
            )

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):  # it died: there is no answer either
            self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            said = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((text for text in reversed(said) if text.strip()), "it said nothing")
            raise PeerError(f"{'ended' if ready else f'no answer in {PATIENCE} s'}: {last.strip()[:300]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Let it end by itself, for some clean up after themselves; a loader that hangs is killed."""
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
