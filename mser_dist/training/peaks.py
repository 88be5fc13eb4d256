"""What a GPU could compute at most, by its name: the bound that MFU and HFU are shares of."""

import torch

# Dense TFLOP/s, without sparsity, of (bfloat16, float16, TF32, float32); 0: the format is not in its matrix units.
# Of a device as torch counts them: of AMD's MI250 and MI250X one of the card's two chips. Longer names stand first.
# The 16-bit figures of H100 (SXM, NVL, PCIe), H200, H800, H20, GH200, B200, A100, A30, L40, L40S, RTX 4090, V100,
# MI250X and MI300X were compared with tables that others publish; the rest is from memory: see engine.peak_tflops.
# After NVIDIA's data sheets of the data-centre GPUs, whose numbers "with sparsity" are halved; NVIDIA's architecture
# white papers for RTX (Ampere GA102, Ada, Blackwell), the rate that adds up in float32; AWS's page of instances for
# A10G; AMD's data sheets, whose float32 is that of the matrix units.
_PEAKS: dict[str, tuple[float, float, float, float]] = {
    "GH200": (989.4, 989.4, 494.7, 66.9),
    "B200": (2250.0, 2250.0, 1125.0, 75.0),
    "H200 NVL": (835.5, 835.5, 417.5, 60.0),
    "H200": (989.4, 989.4, 494.7, 66.9),
    "H100 NVL": (835.5, 835.5, 417.5, 60.0),
    "H100 PCIe": (756.0, 756.0, 378.0, 51.2),
    "H100": (989.4, 989.4, 494.7, 66.9),
    "H800": (989.4, 989.4, 494.7, 66.9),
    "H20": (148.0, 148.0, 74.0, 44.0),
    "A100": (312.0, 312.0, 156.0, 19.5),
    "A800": (312.0, 312.0, 156.0, 19.5),
    "L40S": (362.1, 362.1, 183.2, 91.6),
    "L40": (181.1, 181.1, 90.5, 90.5),
    "L4": (121.0, 121.0, 60.0, 30.3),
    "A10G": (70.0, 70.0, 35.0, 35.0),
    "A10": (125.0, 125.0, 62.5, 31.2),
    "A30": (165.0, 165.0, 82.0, 10.3),
    "A40": (149.7, 149.7, 74.8, 37.4),
    "RTX A6000": (154.8, 154.8, 77.4, 38.7),
    "RTX 6000 Ada": (364.2, 364.2, 182.1, 91.1),
    "RTX 5090": (209.5, 209.5, 104.8, 104.8),
    "RTX 4090": (165.2, 165.2, 82.6, 82.6),
    "RTX 3090": (71.0, 71.0, 35.6, 35.6),
    "V100-PCIE": (0.0, 112.0, 0.0, 14.0),
    "V100": (0.0, 125.0, 0.0, 15.7),
    "T4": (0.0, 65.0, 0.0, 8.1),
    "MI325X": (1307.4, 1307.4, 653.7, 163.4),
    "MI300X": (1307.4, 1307.4, 653.7, 163.4),
    "MI250X": (191.5, 191.5, 0.0, 47.9),
    "MI250": (181.0, 181.0, 0.0, 45.3),
    "MI210": (181.0, 181.0, 0.0, 45.3),
}


def peak_of(name: str, dtype: str, tf32: bool = False) -> float | None:
    """Dense FLOP/s of the device that torch calls `name`; None where it is not known, as of a slice (MIG).

    dtype: of `engine.dtype`. tf32: float32 products are made in TF32.
    """
    if " MIG " in name or "Laptop" in name:
        return None
    words = f" {name.replace('-', ' ')} "
    for known, (bfloat16, float16, fast, plain) in _PEAKS.items():
        if f" {known.replace('-', ' ')} " in words:
            float32 = fast if tf32 and fast else plain
            return 1e12 * {"bfloat16": bfloat16, "float16": float16, "float32": float32}[dtype] or None
    return None


def peak(device: str, dtype: str, given: float | None) -> float | None:
    """FLOP/s of this rank's device at most: `given` in TFLOP/s, or by its name; None where it is unknown, or a CPU."""
    if given is not None:
        return 1e12 * given
    if device != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(), dtype, torch.backends.cuda.matmul.allow_tf32)
