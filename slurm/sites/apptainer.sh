#!/bin/bash
# shellcheck disable=SC2034 # the settings are read by slurm/site.sh, which sources this file
# A site with Apptainer (or Singularity: its name in SITE_RUN): each task starts the container itself.
# Make the image (slurm/containers/README.md), copy this file, set it, and name it in MSER_SITE. Every line is an example.

# ---- what sbatch is told ---------------------------------------------------------------------------------------------
SITE_SBATCH=(
  --partition=gpu
  --account=my-project
  --constraint=a100
)
# GPUs by the task. The binding that SLURM implies by it is taken back (slurm/site.sh): NCCL has to see all GPUs of a node to
# use NVLink between them.
SITE_GPUS=--gpus-per-task=1
SITE_NODE_GPUS=4

# ---- the container ---------------------------------------------------------------------------------------------------
SITE_RUN=(
  apptainer exec
  --nv # the host's driver, and the GPUs
  --bind "$MSER_HOME,$PWD,/data"
  --pwd "$PWD"
  /images/mser.sif
)
SITE_MSER=/opt/mser/bin/mser

# ---- what the job does first, outside the container, which takes over what is exported --------------------------------
site_begin() {
  command -v apptainer >/dev/null || module load apptainer
  # A node's /tmp is the container's too; the home folder's packages are none of its.
  export PYTHONNOUSERSITE=1
  export NCCL_SOCKET_IFNAME=hsn0 GLOO_SOCKET_IFNAME=hsn0
  export HF_HOME=/data/huggingface HF_HUB_OFFLINE=1
}
