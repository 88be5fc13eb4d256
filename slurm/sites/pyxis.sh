#!/bin/bash
# shellcheck disable=SC2034 # the settings are read by slurm/site.sh, which sources this file
# A site with enroot and the Pyxis plugin: srun starts each task in a container. Nothing of mser is needed outside.
# Make the image (slurm/containers/README.md), copy this file, set it, and name it in MSER_SITE. Every line is an example.

# ---- what sbatch is told ---------------------------------------------------------------------------------------------
SITE_SBATCH=(
  --partition=batch
  --account=my-project
  --exclusive
  --mem=0
)
SITE_GPUS=--gres=gpu:%n # or --gres=gpu:h100:%n
SITE_NODE_GPUS=8

# ---- the container ---------------------------------------------------------------------------------------------------
# Every folder that the job reads or writes is mounted under its own name: the repository, where the job was submitted
# (logs, runs), and data.
SITE_SRUN=(
  --container-image=/images/mser.sqsh
  --container-mounts="$MSER_HOME,$PWD,/data"
  --container-workdir="$PWD"
  --no-container-mount-home
)
SITE_MSER=/opt/mser/bin/mser

# ---- what the job does first, outside the container, which takes over what is exported --------------------------------
site_begin() {
  export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
  export HF_HOME=/data/huggingface HF_HUB_OFFLINE=1
}
