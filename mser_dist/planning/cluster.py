"""The machines that a training is planned for, by names that people use: memory, peaks and links of their GPUs."""

import difflib
import re
from dataclasses import dataclass

from mser_dist.errors import UserError


@dataclass(frozen=True)
class GPU:
    """memory: bytes that torch can use. device: as torch calls it, for `training.peaks`. within, across: bytes a second
    one way, of its link inside the node (NVLink, else PCIe) and of its share of the node's links to others, where
    nobody says otherwise. like: the GPU of the fit whose share of its peak it is taken to reach.
    """

    name: str
    device: str
    memory: float
    within: float
    across: float
    like: str

    @property
    def fitted(self) -> bool:
        """Whether published figures of this very kind went into the constants."""
        return self.name in ("h100", "a100", "a100-40gb")


def _gpu(name: str, device: str, gib: float, within: float, across: float, like: str) -> GPU:
    return GPU(name, device, gib * 2**30, within * 1e9, across * 1e9 / 8, like)


# Memory is what the driver leaves of the data sheet's: about 1 % less. Links after NVIDIA's and AMD's data sheets: half
# of NVLink's sum of both directions, PCIe's of one; across in Gb/s, of the vendor's own systems (DGX A100: 200 Gb/s a
# GPU; DGX H100 and H200: 400) or 100 where there is none.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("h100", "H100", 79.1, 450, 400, "h100"),
        _gpu("h100-pcie", "H100 PCIe", 79.1, 64, 200, "h100"),
        _gpu("h200", "H200", 139.8, 450, 400, "h100"),
        _gpu("gh200", "GH200", 94.5, 450, 400, "h100"),
        _gpu("h800", "H800", 79.1, 200, 400, "h100"),
        _gpu("b200", "B200", 178.0, 900, 400, "h100"),
        _gpu("a100", "A100", 79.1, 300, 200, "a100"),
        _gpu("a100-40gb", "A100", 39.4, 300, 200, "a100"),
        _gpu("a800", "A800", 79.1, 200, 200, "a100"),
        _gpu("a40", "A40", 44.4, 32, 100, "a100"),
        _gpu("a10g", "A10G", 22.0, 32, 100, "a100"),
        _gpu("a30", "A30", 23.5, 32, 100, "a100"),
        _gpu("l40s", "L40S", 44.4, 32, 100, "a100"),
        _gpu("l4", "L4", 22.0, 32, 100, "a100"),
        _gpu("rtx4090", "RTX 4090", 23.5, 32, 100, "a100"),
        _gpu("v100", "V100", 31.7, 150, 100, "a100"),
        _gpu("mi250x", "MI250X", 63.9, 100, 100, "a100"),
        _gpu("mi300x", "MI300X", 191.0, 448, 400, "h100"),
    )
}


@dataclass(frozen=True)
class Cluster:
    """nodes of gpus_per_node alike; across: bytes a second of a GPU's share of the links between nodes."""

    nodes: int
    gpus_per_node: int
    gpu: GPU
    across: float

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    def sized(self, world_size: int) -> "Cluster":
        """The same machines, so many ranks of them: nodes are filled one after the other."""
        inside = min(self.gpus_per_node, world_size)
        return Cluster(-(-world_size // inside), inside, self.gpu, self.across)


def cluster_of(nodes: int, gpus_per_node: int, gpu: str, link: str | None = None) -> Cluster:
    """The cluster that the words of a command name. Raises `UserError` for a GPU that nobody knows, and for none."""
    if nodes < 1 or gpus_per_node < 1:
        raise UserError(f"--nodes {nodes} --gpus-per-node {gpus_per_node}: both are 1 or more")
    if nodes * gpus_per_node > 65536:
        raise UserError(f"--nodes {nodes} --gpus-per-node {gpus_per_node} are more than 65,536 GPUs: name fewer")
    name = gpu.lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-").removesuffix("-80gb")
    if name not in GPUS:
        near = difflib.get_close_matches(name, GPUS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--gpu {gpu}: {hint}known are {', '.join(GPUS)}; take the one that is most like it")
    found = GPUS[name]
    return Cluster(nodes, gpus_per_node, found, found.across if link is None else bytes_a_second(link))


def bytes_a_second(link: str) -> float:
    """Of a link as people write it: 400Gb, 400Gb/s, 400Gbps, or 50GB/s. Raises `UserError` for other words."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(G|T|M)(b|B)(?:/s|ps)?", link.strip())
    if found is None or float(found[1]) == 0:
        raise UserError(
            f"--link {link}: say what a GPU has of the links between nodes, e.g. 400Gb (bits) or 50GB (bytes)"
        )
    return float(found[1]) * {"M": 1e6, "G": 1e9, "T": 1e12}[found[2]] / (8 if found[3] == "b" else 1)
