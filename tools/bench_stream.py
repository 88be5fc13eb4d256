"""How fast one worker gets from tar to log-mel, beside other loaders on the same clips: a table, and JSON.

    python tools/bench_stream.py --json FILE [--audio DIR] [--peers a,b] [--envs DIR] [--rounds 5] [--quick]

Then what `bench_packing.py`, `bench_plan.py` and `bench_encoder.py` measure: padding and waiting by batching, resume,
planning, and the encoder without padding.

Run it from a checkout that `make install` installed. Each loader is a long-lived process with one thread for torch that
decodes in the process itself; a round runs each once, one after the other, and the medians over the rounds are told.
The page cache is warm. Peers that this project does not depend on are installed, at pinned versions, into environments
under --envs; one that cannot be installed, fails, or gives other log-mels than ours is a row with an "error".

The log-mel of the peers is transformers' WhisperFeatureExtractor: "longest" with padding="longest" on batches of 16;
"one-by-one" a clip a call, which is its fastest way and that of the rows that do not name theirs; "30s" its default,
padded to 30 seconds.
`ratio` is ours / that row in clips per second of CPU time, for wall time counts the machine's other work too;
`samples_per_s` is by wall time. `wave_ratio` is the same from tar to waveform, without the log-mel.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mser_dist.errors import UserError
from mser_dist.files import write_json
from tools import bench_packing, bench_plan
from tools.stream_peers import clips
from tools.stream_peers.loaders import OWN_FORMAT, PEERS, Loader, PeerError

TOLERANCE = 1e-4  # of the log-mels, as `audio.log_mel` promises
PACKAGES = ("numpy", "soundfile", "torch", "transformers")

Case = tuple[str, str]  # path, codec


class LoaderBench:
    """Every loader on the same clips, in turn."""

    def __init__(self, names: list[str], folder: Path, envs: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.loaders: dict[str, Loader] = {}
        self.errors: dict[Case, str] = {}
        self.differences: dict[Case, float] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.times: dict[Case, list[dict[str, Any]]] = defaultdict(list)
        for name in names:
            print(f"{name}: starts", file=sys.stderr)
            try:
                log = folder / f"{name}.log"
                self.loaders[name] = stack.enter_context(Loader(PEERS[name], envs, log))
                self.versions[name] = self.loaders[name].ask("versions", packages=[PEERS[name].package, *PACKAGES])
            except PeerError as error:
                for codec in clips.CODECS:
                    self._fail((name, codec), error)

    def _fail(self, case: Case, error: PeerError) -> None:
        """A peer becomes a row with an error; without ours there is nothing to compare with."""
        if case[0] == "ours":
            raise error
        print(f"{case[0]}, {case[1]}: {error}", file=sys.stderr)
        self.errors[case] = str(error)

    def _container(self, name: str, codec: str) -> str:
        module = PEERS[name].module
        return str(self.folder / codec / {"ours": "shards", "wds": "shards"}.get(module, module))

    def cases(self) -> list[Case]:
        """What has not failed, ours first."""
        return [(name, c) for c in clips.CODECS for name in self.loaders if (name, c) not in self.errors]

    def check(self) -> None:
        """Write the containers, compare the log-mels of every clip with ours. It warms everything up, too."""
        for name, codec in self.cases():
            loader, to = self.loaders[name], self._container(name, codec)
            mels = self.folder / codec / "mels"
            try:
                if name == "ours":
                    mels.mkdir()
                    loader.ask("keep", folder=to, to=str(mels))
                    continue
                if PEERS[name].module in OWN_FORMAT:
                    plain = self.folder / codec / "plain"
                    loader.ask("write", files=[str(file) for file in sorted(plain.iterdir())], folder=to)
                difference = loader.ask("compare", folder=to, to=str(mels))["max_difference"]
                if not difference <= TOLERANCE:
                    raise PeerError(f"its log-mels differ from ours by {difference:.1e}")
                self.differences[name, codec] = difference
            except PeerError as error:
                self._fail((name, codec), error)

    def round(self) -> None:
        for name, codec in self.cases():
            try:
                folder = self._container(name, codec)
                mel = self.loaders[name].ask("time", folder=folder, mel=True)
                wave = self.loaders[name].ask("time", folder=folder, mel=False)
                self.times[name, codec].append(mel | {"wave_cpu_s": wave["cpu_s"]})
            except PeerError as error:
                self._fail((name, codec), error)

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for codec in clips.CODECS:
            ours = self._medians("ours", codec)
            for name in PEERS:
                row: dict[str, Any] = {"path": name, "codec": codec}
                if (name, codec) in self.errors:
                    rows.append(row | {"error": self.errors[name, codec]})
                elif name in self.loaders:
                    own = self._medians(name, codec)
                    row |= own | {"ratio": own["cpu_s_per_1000"] / ours["cpu_s_per_1000"]}
                    row["wave_ratio"] = own["wave_cpu_s_per_1000"] / ours["wave_cpu_s_per_1000"]
                    rows.append(row | {"max_difference": self.differences.get((name, codec), 0.0)})
        return rows

    def _medians(self, name: str, codec: str) -> dict[str, Any]:
        times = self.times[name, codec]
        clip_count = times[0]["clips"]
        middle = {key: statistics.median(one[key] for one in times) for key in ("cpu_s", "wall_s", "wave_cpu_s")}
        return {
            "samples_per_s": clip_count / middle["wall_s"],
            "cpu_s_per_1000": 1000 * middle["cpu_s"] / clip_count,
            "wave_cpu_s_per_1000": 1000 * middle["wave_cpu_s"] / clip_count,
        }


def loader(options: argparse.Namespace) -> dict[str, Any]:
    """The rows, and what they were measured on."""
    with tempfile.TemporaryDirectory(prefix="bench_stream-") as name, ExitStack() as stack:
        folder = Path(name)
        print("the clips are made", file=sys.stderr)
        mean = clips.write(folder, options.audio, options.clips)
        bench = LoaderBench(options.peers, folder, options.envs, stack)
        bench.check()
        load_before = os.getloadavg()
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            bench.round()
        facts = {
            "clips": options.clips,
            "mean_seconds": mean,
            "speech": "recorded" if options.audio else "synthetic",
            "rounds": options.rounds,
            "load_average": {"before": load_before, "after": os.getloadavg()},
            "versions": bench.versions,
        }
        return {"loader": bench.rows(), "loader_facts": facts}


def table(result: dict[str, Any]) -> str:
    facts = result["loader_facts"]
    load = [f"{facts['load_average'][when][0]:.1f}" for when in ("before", "after")]
    lines = [
        f"{facts['clips']} clips of {facts['speech']} speech, {facts['mean_seconds']:.1f} s in the mean; one process, "
        f"one thread; medians of {facts['rounds']} rounds; load average {load[0]} to {load[1]}",
        "",
        f"{'path':<26}{'codec':<6}{'clips/s':>9}{'CPU s/1000':>12}{'ratio':>8}{'… to wave':>12}{'ratio':>8}",
    ]
    for row in result["loader"]:
        start = f"{row['path']:<26}{row['codec']:<6}"
        if "error" in row:
            lines.append(start + row["error"])
        else:
            numbers = f"{row['samples_per_s']:>9.0f}{row['cpu_s_per_1000']:>12.2f}{row['ratio']:>8.2f}"
            lines.append(f"{start}{numbers}{row['wave_cpu_s_per_1000']:>12.2f}{row['wave_ratio']:>8.2f}")
    return "\n".join(lines)


def encoder(quick: bool) -> dict[str, Any]:
    from tools import bench_encoder  # here: the processes that plan import this file, and their memory is measured

    return bench_encoder.measure(3.0, rounds=1 if quick else 7, batch=1 if quick else 4)


PARTS: dict[str, Callable[[bool], Any]] = {
    "packing": lambda quick: bench_packing.rows(20_000 if quick else 200_000),
    "resume": lambda quick: bench_plan.resume(20 if quick else 1000, rounds=1 if quick else 7),
    "plan": lambda quick: bench_plan.plan(20_000, ["shuffle"]) if quick else bench_plan.plan(),
    "encoder": encoder,
}


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--audio", type=Path, help="folder of recorded speech for the clips (default: eSpeak's)")
    parser.add_argument("--peers", default=",".join(PEERS), help="loaders to compare with ours (default: %(default)s)")
    cache = Path("~/.cache/mser_dist/bench").expanduser()
    parser.add_argument("--envs", type=Path, default=cache, help="environments of the peers (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=1200, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few clips, 1 round, no peers to install")
    options = parser.parse_args()
    asked = options.peers.split(",")
    if unknown := [name for name in asked if name not in PEERS]:
        parser.error(f"--peers: there is no {unknown[0]!r}, only {', '.join(PEERS)}")
    if options.quick:
        options.clips, options.rounds = 16, 1
        asked = [name for name in asked if not PEERS[name].requires]
    options.peers = [name for name in PEERS if name in asked or name == "ours"]  # in the order of the table
    try:
        result = loader(options)
    except (PeerError, UserError) as error:
        sys.exit(f"bench_stream: {error}")
    print(table(result))
    for name, part in PARTS.items():
        result[name] = part(options.quick)
        print(bench_packing.table(result[name]) if name == "packing" else f"{name}: {json.dumps(result[name])}")
    if options.json:
        write_json(options.json, result | {"machine": machine()})


if __name__ == "__main__":
    main()
