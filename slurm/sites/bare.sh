#!/bin/bash
# shellcheck disable=SC2034 # the settings are read by slurm/site.sh, which sources this file
# A site without containers: modules, and the environment that `make install` made on a file system that every node sees.
# Copy this file, set it for your cluster, and name it in MSER_SITE. Every line is an example.

# ---- what sbatch is told ---------------------------------------------------------------------------------------------
SITE_SBATCH=(
  --partition=gpu
  --account=my-project
  # --constraint=h100
  # --qos=long
  # --mem=0            # all of a node's memory, where a site does not hand it out by default
  # --cpus-per-task=16 # a node's cores by its GPUs
)
SITE_GPUS=--gpus-per-node=%n # or --gpus-per-node=h100:%n
SITE_NODE_GPUS=8             # a job script that asks for more, and for as many tasks, gets so many

# ---- what the job does first -----------------------------------------------------------------------------------------
site_begin() {
  # `module` is a function of login shells, which a job's shell may lack.
  command -v module >/dev/null || source /etc/profile
  module load cuda/13.0 gcc/13 # the compiler builds DeepSpeed's fused optimizers
  # InfiniBand: the card for the meeting of the ranks, and the adapters for the data.
  export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
  export NCCL_IB_HCA=mlx5 # a prefix: all adapters of that name; =mlx5_0,mlx5_1 those alone
  # RoCE wants the right GID, and NCCL's own choice fits most sites: export NCCL_IB_GID_INDEX=3
  # Ethernet alone: export NCCL_IB_DISABLE=1
  # To see what NCCL chooses: export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET
  # Models fetched beforehand, where compute nodes have no way out.
  export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1
  # export MSER_FEATURES=/shared/features         # what frozen encoders make of the clips
  # export MLFLOW_TRACKING_URI=http://mlflow:5000 # default: mlflow.db beside the runs
}
