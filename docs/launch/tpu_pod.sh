#!/usr/bin/env bash
# One run on every host of a TPU pod slice: float and joint training, search on host 0, fine-tuning.
#
#   NAME=my-slice ZONE=us-central2-b PROJECT=my-project CONFIG=configs/imagenet_resnet50.py WORKDIR=/mnt/runs/r50 \
#       BUDGET=bitops=W3A4 bash docs/launch/tpu_pod.sh
#
# Needs: gcloud; this checkout at the same path CHECKOUT on every host, with a .venv in which `pip install "jax[tpu]"` was done;
# WORKDIR and the data set on a file system that all hosts share (Filestore over NFS, for one).
# Start it again after a preemption: what was done is not done again.
# Never run on a real TPU: checked with bash -n only.
set -euo pipefail

: "${NAME:?the TPU VM of the slice}" "${ZONE:?}" "${PROJECT:?}" "${CONFIG:?}" "${WORKDIR:?}" "${BUDGET:?e.g. bitops=W3A4}"
CHECKOUT=${CHECKOUT:-mpq_jax}
PARALLEL=${PARALLEL:---parallel.distributed true --parallel.data 0}

on() {
    local hosts=$1
    shift
    gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --project "$PROJECT" --worker "$hosts" \
        --command "cd $CHECKOUT && $*"
}

train="JAX_PLATFORMS=tpu .venv/bin/python train.py --config $CONFIG --workdir $WORKDIR $PARALLEL"
on all "$train"
# SIGTERM ends train.py with exit code 0 too; it is done when there is a table.
on 0 "test -f $WORKDIR/importance.json"
on 0 ".venv/bin/python search.py --workdir $WORKDIR --budget $BUDGET"
on all "$train --policy $WORKDIR/policy.json"
