#!/bin/bash
# Inside an image that is being built (Dockerfile, apptainer.def): Python, a compiler, and the environment that `make install`
# makes by constraints.txt, in /opt/mser. TORCH_ARGS: options of pip for torch alone.
set -euo pipefail

here=/opt/mser_dist
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# python3-dev and g++ compile DeepSpeed's optimizers; ninja comes with the environment. numactl and the verbs library: NCCL
# over InfiniBand.
apt-get install -y -qq --no-install-recommends ca-certificates g++ libibverbs1 libnuma1 make python3 python3-dev python3-venv
rm -rf /var/lib/apt/lists/*

export PIP_NO_CACHE_DIR=1
make -C "$here" install VENV=/opt/mser TORCH_ARGS="${TORCH_ARGS:-}"

# The pins are met, and torch's CUDA is the base's: else what is compiled in the container would not load.
/opt/mser/bin/python - "$here/constraints.txt" <<'PYTHON'
import os, re, subprocess, sys
from importlib.metadata import PackageNotFoundError, version

import torch

for line in open(sys.argv[1], encoding="utf-8"):
    if pin := re.match(r"([\w.-]+)==(\S+)", line):
        try:
            found = version(pin[1]).partition("+")[0]
        except PackageNotFoundError:
            continue  # a constraint is no request
        if found != pin[2]:
            sys.exit(f"install.sh: error: {pin[1]} is {found}, where constraints.txt pins {pin[2]}")
if os.path.exists("/usr/local/cuda/bin/nvcc"):
    said = subprocess.run(["/usr/local/cuda/bin/nvcc", "--version"], capture_output=True, encoding="utf-8", check=True).stdout
    there = re.search(r"release (\d+)", said)
    if torch.version.cuda is None or there is None or torch.version.cuda.split(".")[0] != there[1]:
        sys.exit(
            f"install.sh: error: torch is built for CUDA {torch.version.cuda}, the base has {there and there[1]}: build with "
            "another BASE, or name the index of another torch with TORCH_ARGS"
        )
PYTHON
# The image lies read-only on the nodes, for any user.
/opt/mser/bin/python -m compileall -q "$here/mser_dist"
chmod -R a+rX /opt/mser "$here"
